/** Parts that several pages use. */

import type { ComponentChildren, JSX } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Refusal } from "./api";

export function Problem({ error }: { error: unknown }): JSX.Element | null {
  if (error === null || error === undefined) return null;
  const refused = error instanceof Refusal ? error : null;
  return (
    <div class="problem" role="alert">
      <strong>{refused?.status ? `Refused (${refused.status})` : "Failed"}</strong>
      <p class="text">{error instanceof Error ? error.message : String(error)}</p>
      {refused?.retryAfter ? <p>Try again in {refused.retryAfter} s.</p> : null}
      {refused?.request ? <p class="quiet">Request {refused.request}</p> : null}
    </div>
  );
}

export function Tier({ tier }: { tier: string }): JSX.Element {
  return <span class={`tier tier-${/^[a-z]+$/.test(tier) ? tier : "other"}`}>{tier}</span>;
}

export function Field({ label, hint, children }: { label: string; hint?: string; children: ComponentChildren }) {
  return (
    <label class="field">
      <span>{label}</span>
      {children}
      {hint ? <small>{hint}</small> : null}
    </label>
  );
}

interface Column<T> {
  title: string;
  width: string;
  cell: (row: T) => ComponentChildren;
}

const HEIGHT = 38;

/** A table that holds the visible rows only, so that its length costs nothing. */
export function LongTable<T>(props: {
  label: string;
  rows: readonly T[];
  columns: Column<T>[];
  id: (row: T) => string;
  selected?: string | undefined;
}): JSX.Element {
  const place = useRef<HTMLDivElement>(null);
  const [view, setView] = useState({ top: 0, height: 600 });
  useLayoutEffect(() => {
    const own = place.current!;
    const look = () => setView({ top: own.scrollTop, height: own.clientHeight });
    const watch = new ResizeObserver(look);
    watch.observe(own);
    own.addEventListener("scroll", look, { passive: true });
    return () => {
      watch.disconnect();
      own.removeEventListener("scroll", look);
    };
  }, []);
  const first = Math.max(0, Math.floor(view.top / HEIGHT) - 6);
  const last = Math.min(props.rows.length, Math.ceil((view.top + view.height) / HEIGHT) + 6);
  const widths = { gridTemplateColumns: props.columns.map((own) => own.width).join(" ") };
  return (
    <div class="long" role="table" aria-label={props.label} aria-rowcount={props.rows.length + 1}>
      <div role="rowgroup">
        <div class="row head" role="row" aria-rowindex={1} style={widths}>
          {props.columns.map((own) => (
            <div role="columnheader" key={own.title}>
              {own.title}
            </div>
          ))}
        </div>
      </div>
      <div class="rows" role="rowgroup" ref={place} tabIndex={0} aria-label={props.label}>
        <div class="room" role="presentation" style={{ height: `${props.rows.length * HEIGHT}px` }}>
          {props.rows.slice(first, last).map((row, at) => (
            <div
              class={props.id(row) === props.selected ? "row selected" : "row"}
              role="row"
              aria-rowindex={first + at + 2}
              key={props.id(row)}
              style={{ ...widths, top: `${(first + at) * HEIGHT}px` }}
            >
              {props.columns.map((own) => (
                <div role="cell" key={own.title}>
                  {own.cell(row)}
                </div>
              ))}
            </div>
          ))}
        </div>
      </div>
    </div>
  );
}

/** A question before a change; Escape closes it, as of every dialog. */
export function Confirm(props: {
  title: string;
  action: string;
  danger?: boolean;
  children?: ComponentChildren;
  run: () => Promise<void>;
  close: () => void;
}): JSX.Element {
  const place = useRef<HTMLDialogElement>(null);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState<unknown>(null);
  useEffect(() => place.current!.showModal(), []);
  const run = async () => {
    setBusy(true);
    setError(null);
    try {
      await props.run();
      props.close();
    } catch (found) {
      setError(found);
      setBusy(false);
    }
  };
  return (
    <dialog ref={place} onClose={props.close} aria-labelledby="confirm-title">
      <h2 id="confirm-title">{props.title}</h2>
      {props.children}
      <Problem error={error} />
      <div class="actions">
        <button type="button" onClick={props.close}>
          Cancel
        </button>
        <button type="button" class={props.danger ? "danger" : "primary"} disabled={busy} onClick={run}>
          {props.action}
        </button>
      </div>
    </dialog>
  );
}

export function when(seconds: number): string {
  return new Date(1000 * seconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

export function count(value: number): string {
  return value.toLocaleString("en");
}

export function size(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; bytes >= 1024 && at < units.length - 1; at++) bytes /= 1024;
  return `${at === 0 ? bytes : bytes.toFixed(1)} ${units[at]}`;
}
