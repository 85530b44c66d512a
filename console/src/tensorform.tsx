/** Inference on tensors: a form from the model's metadata, and its outputs. */

import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import type { Model, Tensor } from "./api";
import { difference, elements, filled, layout, parsed, pixels, sized, type ImageChoice } from "./tensors";
import type { PaneProps } from "./try";
import { count, Field, Problem } from "./ui";

const MOST_TEXT = 20_000;
const MOST_SHOWN = 256;

interface Given {
  kind: "zeros" | "ones" | "random" | "json" | "image";
  free: number[];
  text: string;
  file: File | null;
  image: ImageChoice;
}

interface Answer {
  task: string;
  outputs: Tensor[];
  version: string;
  seconds: number;
  error: unknown;
}

export function TensorPane({ api, tasks }: PaneProps & { kind: string }): JSX.Element {
  const [model, setModel] = useState<Model | null>(null);
  const [given, setGiven] = useState<Record<string, Given>>({});
  const [answers, setAnswers] = useState<Answer[]>([]);
  const [error, setError] = useState<unknown>(null);
  const [busy, setBusy] = useState(false);
  const [first] = tasks;
  useEffect(() => {
    let current = true;
    api.model(first!).then(
      (found) => {
        if (!current) return;
        setError(null);
        setModel(found);
        setGiven((known) => Object.fromEntries(found.inputs.map((own) => [own.name, known[own.name] ?? begin(own)])));
      },
      (found: unknown) => {
        if (!current) return;
        setModel(null);
        setError(found);
      },
    );
    return () => {
      current = false;
    };
  }, [api, first]);
  useEffect(() => setAnswers([]), [tasks]);

  const run = async () => {
    setBusy(true);
    setError(null);
    try {
      const inputs = await Promise.all(model!.inputs.map((own) => tensor(own, given[own.name]!)));
      setAnswers(
        await Promise.all(
          tasks.map(async (task): Promise<Answer> => {
            const began = performance.now();
            const none = { task, outputs: [], version: "", error: null };
            try {
              const found = await api.infer(task, inputs);
              const seconds = (performance.now() - began) / 1000;
              return { ...none, outputs: found.outputs, version: found.model_version, seconds };
            } catch (refused) {
              return { ...none, seconds: 0, error: refused };
            }
          }),
        ),
      );
    } catch (found) {
      setError(found);
    }
    setBusy(false);
  };

  return (
    <>
      {model === null ? null : (
        <form
          class="inputs"
          onSubmit={(event) => {
            event.preventDefault();
            void run();
          }}
        >
          {model.inputs.map((own) =>
            given[own.name] === undefined ? null : (
              <InputForm
                key={own.name}
                input={own}
                given={given[own.name]!}
                set={(next) => setGiven((known) => ({ ...known, [own.name]: next }))}
              />
            ),
          )}
          <div class="actions">
            <button class="primary" disabled={busy}>
              Run
            </button>
          </div>
        </form>
      )}
      <Problem error={error} />
      <div class={answers.length > 1 ? "sides" : ""}>
        {answers.map((own, at) => (
          <Outputs key={`${at} ${own.task}`} answer={own} other={answers[1 - at]} />
        ))}
      </div>
    </>
  );
}

function begin(input: Tensor): Given {
  const own = layout(input);
  const free = input.shape.filter((size) => size < 0).map((_, at) => (at === 0 ? 1 : own === null ? 4 : 224));
  const image: ImageChoice = { scale: "unit", height: known(own?.height), width: known(own?.width) };
  const shape = sized(input, free);
  const kind = own !== null && own.channels === 3 ? "image" : elements(shape) > 4096 ? "random" : "json";
  return { kind, free, text: written(input, shape), file: null, image };
}

const known = (size: number | undefined) => (size !== undefined && size > 0 ? size : 224);

function written(input: Tensor, shape: number[]): string {
  if (elements(shape) > 4096) return "";
  return JSON.stringify(nested(filled(input, shape, input.datatype.startsWith("FP") ? "random" : "ones"), shape));
}

function nested(values: unknown[], shape: readonly number[]): unknown[] {
  if (shape.length <= 1) return values;
  const [number, ...rest] = shape as [number, ...number[]];
  const step = elements(rest);
  return Array.from({ length: number }, (_, at) => nested(values.slice(at * step, (at + 1) * step), rest));
}

async function tensor(input: Tensor, own: Given): Promise<Tensor> {
  const shape = sized(input, own.free);
  if (own.kind === "json") return parsed(input, own.text, shape);
  if (own.kind === "image") {
    if (own.file === null) throw new Error(`Input ${input.name} has no image yet.`);
    return pixels(input, layout(input)!, own.file, own.image);
  }
  return { name: input.name, datatype: input.datatype, shape, data: filled(input, shape, own.kind) };
}

function InputForm({ input, given, set }: { input: Tensor; given: Given; set: (next: Given) => void }): JSX.Element {
  const own = layout(input);
  const kinds = ["json", "random", "ones", "zeros", ...(own === null ? [] : ["image"])];
  const free = input.shape.map((size, axis) => ({ size, axis })).filter(({ size }) => size < 0);
  return (
    <fieldset>
      <legend>
        {input.name} <span class="quiet">{`${input.datatype} [${input.shape.map((size) => (size < 0 ? "?" : size)).join(", ")}]`}</span>
      </legend>
      <div class="fields">
        <Field label="Values">
          <select value={given.kind} onChange={(event) => set({ ...given, kind: event.currentTarget.value as Given["kind"] })}>
            {kinds.map((kind) => (
              <option value={kind} key={kind}>
                {kind === "json" ? "JSON" : kind}
              </option>
            ))}
          </select>
        </Field>
        {given.kind === "image" || given.kind === "json"
          ? null
          : free.map(({ axis }, at) => (
              <Field label={`Size of axis ${axis}`} key={axis}>
                <input
                  type="number"
                  min={1}
                  value={given.free[at]}
                  onInput={(event) => set({ ...given, free: given.free.with(at, Number(event.currentTarget.value) || 1) })}
                />
              </Field>
            ))}
        {given.kind === "image" && own !== null ? <ImageForm input={input} given={given} set={set} /> : null}
      </div>
      {given.kind === "json" ? (
        <Field label={`JSON of ${input.name}`}>
          <textarea
            rows={5}
            spellcheck={false}
            value={given.text}
            onInput={(event) => set({ ...given, text: event.currentTarget.value })}
          />
        </Field>
      ) : null}
    </fieldset>
  );
}

const SCALES: Record<ImageChoice["scale"], string> = {
  unit: "0 to 1",
  signed: "-1 to 1",
  bytes: "0 to 255",
  imagenet: "ImageNet's mean and deviation",
};

function ImageForm({ input, given, set }: { input: Tensor; given: Given; set: (next: Given) => void }): JSX.Element {
  const own = layout(input)!;
  const [shown, setShown] = useState<string | null>(null);
  useEffect(() => {
    if (given.file === null) return undefined;
    const url = URL.createObjectURL(given.file);
    setShown(url);
    return () => URL.revokeObjectURL(url);
  }, [given.file]);
  const side = (name: "height" | "width") => (
    <Field label={name === "height" ? "Height" : "Width"}>
      <input
        type="number"
        min={1}
        max={4096}
        value={given.image[name]}
        onInput={(event) => set({ ...given, image: { ...given.image, [name]: Number(event.currentTarget.value) || 1 } })}
      />
    </Field>
  );
  return (
    <>
      <Field label="Image">
        <input
          type="file"
          accept="image/*"
          onChange={(event) => set({ ...given, file: event.currentTarget.files?.[0] ?? null })}
        />
      </Field>
      {own.height < 0 ? side("height") : null}
      {own.width < 0 ? side("width") : null}
      {input.datatype === "UINT8" ? null : (
        <Field label="Range">
          <select
            value={given.image.scale}
            onChange={(event) =>
              set({ ...given, image: { ...given.image, scale: event.currentTarget.value as ImageChoice["scale"] } })
            }
          >
            {Object.entries(SCALES).map(([scale, text]) => (
              <option value={scale} key={scale}>
                {text}
              </option>
            ))}
          </select>
        </Field>
      )}
      {shown === null ? null : <img class="preview" src={shown} alt="The chosen image" />}
    </>
  );
}

function Outputs({ answer, other }: { answer: Answer; other: Answer | undefined }): JSX.Element {
  return (
    <section class="answer" aria-label={`Answer of ${answer.task}`}>
      <h2>
        {answer.task}
        {answer.error === null ? (
          <span class="quiet">
            {" "}
            version {answer.version}, {(1000 * answer.seconds).toFixed(0)} ms
          </span>
        ) : null}
      </h2>
      <Problem error={answer.error} />
      {answer.outputs.map((own) => {
        const most = difference(own, other?.outputs.find((one) => one.name === own.name));
        return (
          <div key={own.name}>
            <h3>
              {own.name} <span class="quiet">{`${own.datatype} [${own.shape.join(", ")}]`}</span>
            </h3>
            {most === null ? null : <p>Largest difference from the other: {Number(most.toPrecision(4))}</p>}
            <Values output={own} />
          </div>
        );
      })}
    </section>
  );
}

function Values({ output }: { output: Tensor }): JSX.Element {
  const data = output.data ?? [];
  const classes = output.shape[output.shape.length - 1] ?? 1;
  const numbers = data.every((value) => typeof value === "number") ? (data as number[]) : null;
  if (numbers !== null && output.shape.length === 2 && classes <= 64 && numbers.length <= MOST_SHOWN) {
    const rows = Array.from({ length: output.shape[0] ?? 0 }, (_, at) => numbers.slice(at * classes, (at + 1) * classes));
    return (
      <>
        {rows.map((row, at) => (
          <Bars key={at} label={`Row ${at}`} names={row.map((_, own) => String(own))} values={row} />
        ))}
      </>
    );
  }
  const text = JSON.stringify(data.slice(0, MOST_SHOWN).map((value) => (typeof value === "number" ? Number(value.toPrecision(6)) : value)));
  return (
    <>
      <pre class="text" tabIndex={0}>
        {text.slice(0, MOST_TEXT)}
      </pre>
      {data.length > MOST_SHOWN ? <p class="quiet">The first {MOST_SHOWN} of {count(data.length)} values.</p> : null}
    </>
  );
}

/** Values with bars; the largest is marked. */
export function Bars({ label, names, values }: { label: string; names: string[]; values: number[] }): JSX.Element {
  const most = Math.max(...values.map(Math.abs), 1e-12);
  const best = values.indexOf(Math.max(...values));
  return (
    <table class="bars" aria-label={label}>
      <tbody>
        {values.map((value, at) => (
          <tr key={at} class={at === best ? "best" : ""}>
            <th scope="row">{names[at]}</th>
            <td class="number">{value.toPrecision(5)}</td>
            <td class="bar-cell">
              <svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
                <rect class={value < 0 ? "minus" : "plus"} width={(100 * Math.abs(value)) / most} height="8" rx="1" />
              </svg>
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
