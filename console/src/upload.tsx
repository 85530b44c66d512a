/** Upload of an adapter, by drag and drop or by choice of files. */

import type { JSX } from "preact";
import { useRef, useState } from "preact/hooks";
import type { Task } from "./api";
import type { Session } from "./main";
import { TenantChoice } from "./tasks";
import { Field, Problem, size } from "./ui";

type Mark = "waits" | "runs" | "done" | "failed";

interface Check {
  text: string;
  mark: Mark;
}

const WORDS: Record<Mark, string> = { waits: "waits", runs: "runs", done: "done", failed: "failed" };

export function UploadPage(own: Session): JSX.Element {
  const [files, setFiles] = useState<File[]>([]);
  const [over, setOver] = useState(false);
  const [name, setName] = useState("");
  const [alias, setAlias] = useState("current");
  const [tenant, setTenant] = useState<string | null>(null);
  const [checks, setChecks] = useState<Check[]>([]);
  const [sent, setSent] = useState(0);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>(null);
  const [task, setTask] = useState<Task | null>(null);
  const stop = useRef<AbortController | null>(null);
  const given = sorted(files);

  const take = (list: FileList | null) => {
    const found = [...(list ?? [])];
    if (found.length === 0) return;
    setFiles((known) => [...known.filter((one) => !found.some((other) => other.name === one.name)), ...found]);
    const weights = found.find((one) => one.name.endsWith(".safetensors"));
    if (name === "" && weights !== undefined) setName(suggestion(weights.name));
    setTask(null);
    setError(null);
    setChecks([]);
  };

  const run = async () => {
    const { weights, config, problem } = given;
    setTask(null);
    setError(null);
    setSent(0);
    setBusy(true);
    stop.current = new AbortController();
    const marks = (at: number, failed = false) =>
      STEPS.map((text, step): Check => ({
        text,
        mark: step < at ? "done" : step > at ? "waits" : failed ? "failed" : "runs",
      }));
    let at = 0;
    setChecks(marks(at));
    try {
      const format = problem ?? (await headerProblem(weights!));
      if (format !== null) throw new Error(format);
      setChecks(marks((at = 1)));
      const parts: Record<string, File> = { weights: weights! };
      if (config !== undefined) parts["config"] = config;
      const progress = (part: number) => {
        setSent(part);
        if (part === 1 && at === 1) setChecks(marks((at = 2)));
      };
      const answer = await own.api.upload(name, { alias, tenant }, parts, progress, stop.current.signal);
      setTask(answer);
      setChecks(marks(STEPS.length));
    } catch (found) {
      setError(found);
      setChecks(marks(at, true));
    }
    setBusy(false);
  };

  return (
    <main class="narrow">
      <h1>Upload an adapter</h1>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          void run();
        }}
      >
        <label
          class={over ? "drop over" : "drop"}
          onDragOver={(event) => {
            event.preventDefault();
            setOver(true);
          }}
          onDragLeave={() => setOver(false)}
          onDrop={(event) => {
            event.preventDefault();
            setOver(false);
            take(event.dataTransfer?.files ?? null);
          }}
        >
          <span>
            Drop the files of an adapter here, or <u>choose them</u>
          </span>
          <small>A .safetensors file, and PEFT's adapter_config.json</small>
          <input type="file" multiple aria-label="Files" onChange={(event) => take(event.currentTarget.files)} />
        </label>
        {files.length > 0 ? (
          <table aria-label="Files">
            <tbody>
              {files.map((file) => (
                <tr key={file.name}>
                  <td>{file === given.weights ? "weights" : file === given.config ? "config" : "not used"}</td>
                  <td class="text">{file.name}</td>
                  <td class="number">{size(file.size)}</td>
                  <td class="buttons">
                    <button
                      type="button"
                      aria-label={`Remove ${file.name}`}
                      onClick={() => setFiles(files.filter((one) => one !== file))}
                    >
                      Remove
                    </button>
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        ) : null}
        <div class="fields">
          <Field label="Task">
            <input value={name} onInput={(event) => setName(event.currentTarget.value)} required spellcheck={false} />
          </Field>
          <Field label="Alias">
            <input value={alias} onInput={(event) => setAlias(event.currentTarget.value)} required spellcheck={false} />
          </Field>
          <TenantChoice session={own} tenant={tenant} set={setTenant} />
        </div>
        <div class="actions">
          <button class="primary" disabled={busy || files.length === 0}>
            Upload
          </button>
          {busy ? (
            <button type="button" onClick={() => stop.current?.abort()}>
              Cancel
            </button>
          ) : null}
        </div>
      </form>
      {checks.length > 0 ? (
        <ol class="checks" aria-label="Checks" aria-live="polite">
          {checks.map((check, at) => (
            <li class={check.mark} key={check.text}>
              <span class="mark">{WORDS[check.mark]}</span> {check.text}
              {at === 1 && check.mark === "runs" ? (
                <progress value={sent} max={1} aria-label="Sent">
                  {Math.round(100 * sent)} %
                </progress>
              ) : null}
            </li>
          ))}
        </ol>
      ) : null}
      <Problem error={error} />
      {task === null ? null : (
        <p class="good" role="status">
          Version {task.aliases[alias]} of <a href={`#/tasks/${encodeURIComponent(task.name)}`}>{task.name}</a> is served
          {tenant === null ? (
            <>
              : <a href={`#/try/${encodeURIComponent(task.name)}`}>try it</a>
            </>
          ) : null}
          .
        </p>
      )}
    </main>
  );
}

const STEPS = [
  "The file is a safetensors file",
  "Sent to the server",
  "Read in a child process, compared with the base, run once and registered",
];

function sorted(files: File[]): { weights?: File | undefined; config?: File | undefined; problem: string | null } {
  const known = files.filter((file) => file.name.endsWith(".safetensors"));
  // Beside the weights, the directory of an adapter may have a README.md and more.
  const weights = known.length > 0 ? known : files.filter((file) => !file.name.endsWith(".json"));
  const configs = files.filter((file) => file.name.endsWith(".json"));
  let problem: string | null = null;
  if (weights.length !== 1) problem = `An upload has one file with weights, and ${weights.length} are given.`;
  else if (configs.length > 1) problem = `An upload has one adapter_config.json at most, and ${configs.length} are given.`;
  return { weights: weights[0], config: configs[0], problem };
}

/** Say why a file is no safetensors file; null if it looks like one. The server decides. */
async function headerProblem(file: File): Promise<string | null> {
  const view = new DataView(await file.slice(0, 9).arrayBuffer());
  const wrong = `${file.name} is no safetensors file`;
  if (view.byteLength < 9) return `${wrong}: it has ${view.byteLength} bytes.`;
  const length = Number(view.getBigUint64(0, true));
  if (length > file.size - 8 || view.getUint8(8) !== 0x7b) return `${wrong}: its first bytes are no header.`;
  return null;
}

function suggestion(file: string): string {
  const name = file.replace(/\.safetensors$/, "");
  return name === "adapter_model" ? "" : name.replace(/[^A-Za-z0-9._:-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);
}
