/** The audit log, newest first. */

import type { JSX } from "preact";
import { useCallback, useEffect, useState } from "preact/hooks";
import type { AuditEntry } from "./api";
import type { Session } from "./main";
import { count, Field, Problem, when } from "./ui";

const PAGE = 100;

export function AuditPage({ api }: Session): JSX.Element {
  const [entries, setEntries] = useState<AuditEntry[]>([]);
  const [more, setMore] = useState(false);
  const [filter, setFilter] = useState("");
  const [error, setError] = useState<unknown>(null);
  const read = useCallback(
    async (before: number | null) => {
      try {
        const page = await api.json<AuditEntry[]>("GET", "v2/admin/audit", { limit: PAGE, before });
        setEntries((known) => (before === null ? page : [...known, ...page]));
        setMore(page.length === PAGE);
        setError(null);
      } catch (found) {
        setError(found);
      }
    },
    [api],
  );
  useEffect(() => void read(null), [read]);
  const wanted = filter.trim().toLowerCase();
  const shown = entries.filter((own) => JSON.stringify(own).toLowerCase().includes(wanted));
  return (
    <main>
      <div class="bar">
        <h1>Audit</h1>
        <Field label="Find">
          <input type="search" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
        </Field>
        <button type="button" onClick={() => read(null)}>
          Refresh
        </button>
        <span class="quiet" role="status">
          {count(shown.length)} {shown.length === 1 ? "entry" : "entries"}
        </span>
      </div>
      <Problem error={error} />
      <div class="wide">
        <table aria-label="Audit">
          <thead>
            <tr>
              <th scope="col">Time</th>
              <th scope="col">Tenant</th>
              <th scope="col">Action</th>
              <th scope="col">Target</th>
              <th scope="col">Detail</th>
              <th scope="col">By key</th>
            </tr>
          </thead>
          <tbody>
            {shown.map((own) => (
              <tr key={own.id}>
                <td class="nowrap">{when(own.time)}</td>
                <td>{own.tenant || <span class="quiet">shared</span>}</td>
                <td>{own.action}</td>
                <td>{own.target}</td>
                <td class="text">{detail(own.detail)}</td>
                <td>
                  <code>{own.key}</code>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
      {more ? (
        <button type="button" onClick={() => read(entries[entries.length - 1]!.id)}>
          Older entries
        </button>
      ) : null}
    </main>
  );
}

function detail(own: Record<string, unknown>): string {
  return Object.entries(own)
    .map(([name, value]) => `${name} ${typeof value === "string" ? value : JSON.stringify(value)}`)
    .join(", ");
}
