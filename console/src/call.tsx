/** Calls with a text that are answered whole: completions, embeddings and classes. */

import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { Bars } from "./tensorform";
import type { PaneProps } from "./try";
import { Field, Problem } from "./ui";

interface Classified {
  data: { label?: string; probs?: number[]; values?: number[]; labels?: string[] }[];
  labels?: string[];
}

interface Completed {
  choices: { text: string; finish_reason: string }[];
  usage: { completion_tokens: number };
}

interface Embedded {
  data: { embedding: number[] }[];
}

type Answer = { task: string; error: unknown; document: unknown };

export function CallPane({ api, tasks, kind }: PaneProps & { kind: string }): JSX.Element {
  const [text, setText] = useState("");
  const [tokens, setTokens] = useState(64);
  const [answers, setAnswers] = useState<Answer[]>([]);
  const [busy, setBusy] = useState(false);
  useEffect(() => setAnswers([]), [tasks]);
  const run = async () => {
    setBusy(true);
    const own = kind === "completions" ? { prompt: text, max_tokens: tokens } : { input: [text] };
    setAnswers(
      await Promise.all(
        tasks.map((model) =>
          api.json("POST", `v1/${kind}`, {}, { model, ...own }).then(
            (document): Answer => ({ task: model, error: null, document }),
            (error: unknown): Answer => ({ task: model, error, document: null }),
          ),
        ),
      ),
    );
    setBusy(false);
  };
  return (
    <>
      <form
        class="compose"
        onSubmit={(event) => {
          event.preventDefault();
          void run();
        }}
      >
        <Field label="Text">
          <textarea rows={4} required value={text} onInput={(event) => setText(event.currentTarget.value)} />
        </Field>
        {kind === "completions" ? (
          <Field label="Tokens at most">
            <input type="number" min={1} value={tokens} onInput={(event) => setTokens(Number(event.currentTarget.value) || 1)} />
          </Field>
        ) : null}
        <div class="actions">
          <button class="primary" disabled={busy}>
            Run
          </button>
        </div>
      </form>
      <div class={answers.length > 1 ? "sides" : ""}>
        {answers.map((own, at) => (
          <section class="answer" key={at} aria-label={`Answer of ${own.task}`}>
            <h2>{own.task}</h2>
            <Problem error={own.error} />
            {own.document === null ? null : <Shown kind={kind} answer={own} other={answers[1 - at]} />}
          </section>
        ))}
      </div>
    </>
  );
}

function Shown({ kind, answer, other }: { kind: string; answer: Answer; other: Answer | undefined }): JSX.Element {
  if (kind === "completions") {
    const { choices, usage } = answer.document as Completed;
    return (
      <>
        <p class="text">{choices[0]?.text}</p>
        <p class="quiet">
          {usage.completion_tokens} tokens, ended by {choices[0]?.finish_reason}
        </p>
      </>
    );
  }
  if (kind === "classify") {
    const [own] = (answer.document as Classified).data;
    const values = own?.probs ?? own?.values ?? [];
    const labels = own?.labels ?? (answer.document as Classified).labels ?? values.map((_, at) => String(at));
    return (
      <>
        {own?.label === undefined || own.label === null ? null : <p class="text">{own.label}</p>}
        <Bars label={`Classes of ${answer.task}`} names={labels} values={values} />
      </>
    );
  }
  const vector = (answer.document as Embedded).data[0]?.embedding ?? [];
  const compared = other?.document ? cosine(vector, (other.document as Embedded).data[0]?.embedding ?? []) : null;
  return (
    <>
      <p>
        {vector.length} dimensions
        {compared === null ? "" : `, cosine with the other ${compared.toFixed(4)}`}
      </p>
      <pre class="text" tabIndex={0}>
        {JSON.stringify(vector.slice(0, 64).map((value) => Number(value.toPrecision(5))))}
      </pre>
    </>
  );
}

function cosine(one: number[], other: number[]): number | null {
  if (one.length !== other.length) return null;
  let [dot, a, b] = [0, 0, 0];
  one.forEach((value, at) => {
    dot += value * other[at]!;
    a += value * value;
    b += other[at]! * other[at]!;
  });
  return dot / Math.sqrt(a * b);
}
