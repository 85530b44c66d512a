/** Live figures of the server: queue, batches, times, tokens, residency and tenants. */

import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { Refusal, type Api, type Task } from "./api";
import { Lines, Shares } from "./charts";
import type { Session } from "./main";
import { added, means, ofMetrics, ofStatistics, rates, sizes, type Sample, type Statistics } from "./metrics";
import { useTenants } from "./tasks";
import { count, Problem, size } from "./ui";

const POINTS = 150;
const SECONDS = 2;
const MOST_TASKS = 500;

/** Reads the figures every two seconds, while the page is visible. */
function useSamples({ api, server }: Session): { samples: Sample[]; whole: boolean; error: unknown } {
  const [samples, setSamples] = useState<Sample[]>([]);
  const [whole, setWhole] = useState(true);
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    const stop = new AbortController();
    let timer = 0;
    let all = true;
    const look = async () => {
      try {
        let sample: Sample;
        try {
          sample = all ? await ofServer(api, stop.signal) : await ofTenant(api, server.caller.tenant, stop.signal);
        } catch (found) {
          if (!(all && found instanceof Refusal && found.status === 403)) throw found;
          all = false;
          setWhole(false);
          sample = await ofTenant(api, server.caller.tenant, stop.signal);
        }
        setSamples((known) => [...known, sample].slice(-POINTS));
        setError(null);
      } catch (found) {
        if (!stop.signal.aborted) setError(found);
      }
    };
    const next = async () => {
      if (!document.hidden) await look();
      if (!stop.signal.aborted) timer = setTimeout(next, 1000 * SECONDS);
    };
    void next();
    return () => {
      stop.abort();
      clearTimeout(timer);
    };
  }, [api, server]);
  return { samples, whole, error };
}

async function ofServer(api: Api, signal: AbortSignal): Promise<Sample> {
  const answer = await api.send("GET", "metrics", {}, undefined, signal);
  return ofMetrics(await answer.text(), performance.now() / 1000);
}

async function ofTenant(api: Api, tenant: string, signal: AbortSignal): Promise<Sample> {
  const tasks = await api.json<Task[]>("GET", "v2/registry/tasks", { limit: MOST_TASKS }, undefined, signal);
  if (tasks.length >= MOST_TASKS) throw new Error(`There are ${MOST_TASKS} tasks or more: only a key that may read /metrics has live figures.`);
  const found = await api.json<{ model_stats: Statistics[] }>("GET", "v2/models/stats", {}, undefined, signal);
  const tiers: Record<string, number> = {};
  for (const { tier } of tasks.flatMap((own) => own.versions)) tiers[tier] = (tiers[tier] ?? 0) + 1;
  return ofStatistics(found.model_stats, tenant, tiers, performance.now() / 1000);
}

const short = (value: number) => (value >= 100 ? count(Math.round(value)) : String(Number(value.toPrecision(3))));
const milliseconds = (value: number) => `${short(1000 * value)} ms`;
const perSecond = (value: number) => `${short(value)}/s`;
const whole = (value: number) => count(Math.round(value));
const total = (own: Map<string, number>) => [...own.values()].reduce((sum, value) => sum + value, 0);

export function LivePage(own: Session & { rest: string }): JSX.Element {
  const { samples, whole: all, error } = useSamples(own);
  const last = samples[samples.length - 1];
  const points = Math.max(30, samples.length); // the first minute fills the width
  const tiers = Object.entries(last?.tiers ?? {});
  const batch = sizes(samples, (one) => one.batch).filter(([, number]) => number > 0);
  return (
    <main>
      <div class="bar">
        <h1>Live</h1>
        <span class="quiet" role="status">
          {all ? "The whole server" : `Requests of ${own.server.caller.tenant}`}, every {SECONDS} s, the last {(POINTS * SECONDS) / 60} minutes
        </span>
      </div>
      <Problem error={error} />
      <div class="cards">
        {last?.waitingRows === null ? null : (
          <Lines title="Queued rows" points={points} unit={whole} series={[{ name: "rows", values: samples.map((one) => one.waitingRows) }]} />
        )}
        <Lines title="Rows answered" points={points} unit={perSecond} series={[{ name: "rows", values: rates(samples, (one) => total(one.rows)) }]} />
        <Lines
          title="Time of a request, mean"
          points={points}
          unit={milliseconds}
          least={0.001}
          series={[
            { name: "run", values: means(samples, (one) => one.run) },
            { name: "queue", values: means(samples, (one) => one.queue) },
          ]}
        />
        <Lines title="Rows of a run, mean" points={points} unit={(value) => value.toFixed(1)} series={[{ name: "rows", values: means(samples, (one) => one.batch) }]} />
        {!own.server.text.includes("completions") || !all ? null : (
          <>
            <Lines
              title="Tokens"
              points={points}
              unit={perSecond}
              series={[
                { name: "generated", values: rates(samples, (one) => total(one.tokens)) },
                { name: "prompts", values: rates(samples, (one) => one.prompts) },
              ]}
            />
            <Lines
              title="Sequences"
              points={points}
              unit={whole}
              series={[
                { name: "running", values: samples.map((one) => one.sequences?.running ?? null) },
                { name: "waiting", values: samples.map((one) => one.sequences?.waiting ?? null) },
              ]}
            />
          </>
        )}
        <Shares title="Requests by rows of their run" unit={whole} rows={batch.map(([rows, number]) => [`${all ? "to " : ""}${rows === Infinity ? "more" : rows}`, number])} />
        <Shares title="Adapters by tier" unit={whole} rows={tiers} />
        {all ? <Shares title="Rows by tenant" unit={whole} rows={added(samples, (one) => one.rows).slice(0, 12)} /> : null}
        {all && own.server.text.includes("completions") ? (
          <Shares title="Generated tokens by tenant" unit={whole} rows={added(samples, (one) => one.tokens).slice(0, 12)} />
        ) : null}
      </div>
      {own.server.caller.role === "admin" ? <Tenants {...own} bytes={last?.bytes ?? {}} /> : null}
    </main>
  );
}

function Tenants(own: Session & { bytes: Record<string, number> }): JSX.Element {
  const tenants = useTenants(own);
  const of = (quota: number | null | undefined) => (quota === null || quota === undefined ? "" : ` of ${count(quota)}`);
  const { device_bytes: device, host_bytes: host, rows_taken: taken, rows } = own.bytes;
  return (
    <>
      {device === undefined ? null : (
        <p class="quiet">
          Adapters take {size(device)} on the device, {count(taken ?? 0)} of {count(rows ?? 0)} rows, and {size(host ?? 0)} of host memory.
        </p>
      )}
      <h2>Tenants</h2>
      <div class="wide">
        <table aria-label="Tenants">
          <thead>
            <tr>
              <th scope="col">Tenant</th>
              <th scope="col">Weight</th>
              <th scope="col">Versions</th>
              <th scope="col">Stored</th>
              <th scope="col">Pins</th>
              <th scope="col">Requests/s</th>
              <th scope="col">Rows/s</th>
              <th scope="col">Tokens/min</th>
            </tr>
          </thead>
          <tbody>
            {tenants.map(({ name, quota, used }) => (
              <tr key={name}>
                <td>{name}</td>
                <td>{quota["weight"]}</td>
                <td>
                  {count(used["adapters"] ?? 0)}
                  {of(quota["adapters"])}
                </td>
                <td>
                  {size(used["bytes"] ?? 0)}
                  {quota["bytes"] === null || quota["bytes"] === undefined ? "" : ` of ${size(quota["bytes"])}`}
                </td>
                <td>
                  {count(used["pins"] ?? 0)}
                  {of(quota["pins"])}
                </td>
                <td>{quota["requests_per_s"] ?? "no limit"}</td>
                <td>{quota["rows_per_s"] ?? "no limit"}</td>
                <td>{quota["tokens_per_min"] ?? "no limit"}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </>
  );
}
