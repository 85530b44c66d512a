/** A conversation with one task, or the same with two, as the answers are generated. */

import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { PaneProps } from "./try";
import { Field, Problem } from "./ui";

interface Turn {
  text: string;
  images: string[];
  /** Answers by place of the task. */
  answers: { text: string; note: string; error: unknown }[];
}

type Part = { type: "text"; text: string } | { type: "image_url"; image_url: { url: string } };

export function ChatPane({ api, server, tasks }: PaneProps & { kind: string }): JSX.Element {
  const [turns, setTurns] = useState<Turn[]>([]);
  const [text, setText] = useState("");
  const [images, setImages] = useState<string[]>([]);
  const [tokens, setTokens] = useState(64);
  const [temperature, setTemperature] = useState(0);
  const [stop, setStop] = useState<AbortController | null>(null);
  const end = useRef<HTMLDivElement>(null);
  useEffect(() => {
    end.current?.scrollIntoView({ block: "nearest" });
  }, [turns]);
  useEffect(() => setTurns([]), [tasks]);

  const change = (side: number, next: (answer: Turn["answers"][number]) => Turn["answers"][number]) =>
    setTurns((known) =>
      known.map((turn, at) =>
        at < known.length - 1 ? turn : { ...turn, answers: turn.answers.map((own, place) => (place === side ? next(own) : own)) },
      ),
    );

  const ask = async (side: number, history: Turn[], signal: AbortSignal) => {
    const messages = history.flatMap((turn, at) => [
      { role: "user", content: content(turn) },
      ...(at < history.length - 1 ? [{ role: "assistant", content: turn.answers[side]?.text ?? "" }] : []),
    ]);
    const body = {
      model: tasks[side],
      messages,
      max_tokens: tokens,
      temperature,
      stream: true,
      stream_options: { include_usage: true },
    };
    const began = performance.now();
    try {
      for await (const event of api.events("v1/chat/completions", body, signal)) {
        const choice = (event["choices"] as { delta?: { content?: string }; finish_reason?: string }[] | undefined)?.[0];
        const more = choice?.delta?.content ?? "";
        const usage = event["usage"] as { completion_tokens: number } | null | undefined;
        const note = usage ? rate(usage.completion_tokens, performance.now() - began) : null;
        change(side, (own) => ({ ...own, text: own.text + more, note: note ?? own.note }));
      }
    } catch (error) {
      if (signal.aborted) change(side, (own) => ({ ...own, note: "stopped" }));
      else change(side, (own) => ({ ...own, error }));
    }
  };

  const send = async () => {
    const own = new AbortController();
    setStop(own);
    const next = [...turns, { text, images, answers: tasks.map(() => ({ text: "", note: "", error: null })) }];
    setTurns(next);
    setText("");
    setImages([]);
    await Promise.all(tasks.map((_, side) => ask(side, next, own.signal)));
    setStop(null);
  };

  return (
    <>
      <div class="talk">
        {turns.map((turn, at) => (
          <div key={at}>
            <div class="said-by user">
              <span class="quiet">You</span>
              <p class="text">{turn.text}</p>
              {turn.images.map((url) => (
                <img class="preview" src={url} alt="An image of the message" key={url} />
              ))}
            </div>
            <div class={tasks.length > 1 ? "sides" : ""}>
              {turn.answers.map((answer, side) => (
                <section class="said-by" key={side} aria-label={`Answer ${at + 1} of ${tasks[side]}`} aria-live="polite" aria-busy={stop !== null}>
                  <span class="quiet">
                    {tasks[side]}
                    {answer.note ? ` (${answer.note})` : ""}
                  </span>
                  <p class="text">{answer.text}</p>
                  <Problem error={answer.error} />
                </section>
              ))}
            </div>
          </div>
        ))}
        <div ref={end} />
      </div>
      <form
        class="compose"
        onSubmit={(event) => {
          event.preventDefault();
          if (text.trim() !== "" && stop === null) void send();
        }}
      >
        <Field label="Message" hint="Enter sends it, Shift and Enter begin a new line.">
          <textarea
            rows={3}
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
              event.preventDefault();
              event.currentTarget.form?.requestSubmit();
            }}
          />
        </Field>
        <div class="fields">
          <Field label="Tokens at most">
            <input type="number" min={1} value={tokens} onInput={(event) => setTokens(Number(event.currentTarget.value) || 1)} />
          </Field>
          <Field label="Temperature">
            <input
              type="number"
              min={0}
              max={2}
              step={0.1}
              value={temperature}
              onInput={(event) => setTemperature(Number(event.currentTarget.value) || 0)}
            />
          </Field>
          {server.text.includes("images") ? (
            <Field label="Images">
              <input
                type="file"
                accept="image/png,image/jpeg,image/webp"
                multiple
                onChange={async (event) => setImages(await Promise.all([...(event.currentTarget.files ?? [])].map(dataUrl)))}
              />
            </Field>
          ) : null}
        </div>
        <div class="actions">
          <button class="primary" disabled={stop !== null || text.trim() === ""}>
            Send
          </button>
          {stop === null ? null : (
            <button type="button" onClick={() => stop.abort()}>
              Stop
            </button>
          )}
          {turns.length > 0 && stop === null ? (
            <button type="button" onClick={() => setTurns([])}>
              New conversation
            </button>
          ) : null}
        </div>
      </form>
    </>
  );
}

function content(turn: Turn): string | Part[] {
  if (turn.images.length === 0) return turn.text;
  return [...turn.images.map((url): Part => ({ type: "image_url", image_url: { url } })), { type: "text", text: turn.text }];
}

function rate(tokens: number, milliseconds: number): string {
  return `${tokens} tokens, ${((1000 * tokens) / Math.max(milliseconds, 1)).toFixed(1)} tokens/s`;
}

function dataUrl(file: File): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result as string);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
