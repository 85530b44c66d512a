/** All tasks, and everything that can be done with one. */

import type { JSX } from "preact";
import { useCallback, useEffect, useMemo, useState } from "preact/hooks";
import { of, type Task, type Tenant } from "./api";
import type { Session } from "./main";
import { Confirm, count, Field, LongTable, Problem, Tier, when } from "./ui";

const FIRST = 200;
const PAGE = 10_000;

/** The tasks that a key sees: the first are shown at once, the others come page by page. */
export function useTasks({ api }: Session, tenant: string | null) {
  const [tasks, setTasks] = useState<Task[]>([]);
  const [complete, setComplete] = useState(false);
  const [error, setError] = useState<unknown>(null);
  const [round, setRound] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    const read = async () => {
      const found: Task[] = [];
      let after: string | null = null;
      for (let limit = FIRST; ; limit = PAGE) {
        const page: Task[] = await api.tasks(tenant, after, limit, stop.signal);
        found.push(...page);
        if (page.length >= limit) after = page[page.length - 1]!.name;
        setTasks(found.slice());
        setComplete(page.length < limit);
        if (page.length < limit) return;
      }
    };
    setError(null);
    read().catch((found: unknown) => {
      if (!stop.signal.aborted) setError(found);
    });
    return () => stop.abort();
  }, [api, tenant, round]);
  const again = useCallback(() => setRound((own) => own + 1), []);
  return { tasks, complete, error, again };
}

export function useTenants({ api, server }: Session): Tenant[] {
  const [found, setFound] = useState<Tenant[]>([]);
  const admin = server.caller.role === "admin";
  useEffect(() => {
    if (admin) api.json<Tenant[]>("GET", "v2/admin/tenants").then(setFound, () => setFound([]));
  }, [api, admin]);
  return found;
}

/** Tenants whose tasks an admin's key reaches. */
export function TenantChoice(props: { session: Session; tenant: string | null; set: (tenant: string | null) => void }) {
  const tenants = useTenants(props.session);
  const { caller } = props.session.server;
  if (caller.role !== "admin") return null;
  const others = tenants.map((own) => own.name).filter((own) => own !== caller.tenant);
  return (
    <Field label="Tenant">
      <select value={props.tenant ?? ""} onChange={(event) => props.set(event.currentTarget.value || null)}>
        <option value="">{caller.tenant}</option>
        {others.map((own) => (
          <option value={own} key={own}>
            {own}
          </option>
        ))}
        <option value="shared">shared</option>
      </select>
    </Field>
  );
}

export function TasksPage(own: Session & { rest: string }): JSX.Element {
  const [tenant, setTenant] = useState<string | null>(null);
  const [filter, setFilter] = useState("");
  const { tasks, complete, error, again } = useTasks(own, tenant);
  const shown = useMemo(() => {
    const wanted = filter.trim().toLowerCase();
    return wanted === "" ? tasks : tasks.filter((task) => task.name.toLowerCase().includes(wanted));
  }, [tasks, filter]);
  return (
    <main class={own.rest ? "two" : ""}>
      <section aria-labelledby="tasks-title" class="list">
        <div class="bar">
          <h1 id="tasks-title">Tasks</h1>
          <Field label="Find">
            <input type="search" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
          </Field>
          <TenantChoice session={own} tenant={tenant} set={setTenant} />
          <button type="button" onClick={again}>
            Refresh
          </button>
          <span class="quiet" role="status">
            {filter.trim() ? `${count(shown.length)} of ` : ""}
            {count(tasks.length)} {tasks.length === 1 ? "task" : "tasks"}
            {complete ? "" : ", loading"}
          </span>
        </div>
        <Problem error={error} />
        <LongTable
          label="Tasks"
          rows={shown}
          id={id}
          selected={tasks.find((task) => task.name === own.rest) && own.rest}
          columns={columns(own.rest !== "")}
        />
      </section>
      {own.rest ? <Detail key={`${tenant} ${own.rest}`} {...own} name={own.rest} tenant={tenant} changed={again} /> : null}
    </main>
  );
}

const id = (task: Task) => task.name;

function columns(narrow: boolean) {
  const all = [
    {
      title: "Name",
      width: "minmax(0, 2.2fr)",
      cell: (task: Task) => (
        <a href={`#/tasks/${encodeURIComponent(task.name)}`} title={task.name}>
          {task.name}
        </a>
      ),
    },
    { title: "Owner", width: "minmax(0, 1fr)", cell: (task: Task) => task.tenant ?? <span class="quiet">shared</span> },
    { title: "Current", width: "5.5rem", cell: (task: Task) => task.aliases["current"] ?? "" },
    { title: "Versions", width: "5.5rem", cell: (task: Task) => count(task.versions.length) },
    { title: "Tier", width: "7rem", cell: (task: Task) => <Tier tier={tierOf(task)} /> },
    { title: "Pinned", width: "5.5rem", cell: (task: Task) => task.pin ?? "" },
    { title: "State", width: "6rem", cell: (task: Task) => (task.ready ? "ready" : "unloaded") },
  ];
  return narrow ? all.filter((own) => ["Name", "Current", "Tier", "Pinned"].includes(own.title)) : all;
}

function tierOf(task: Task): string {
  const current = task.versions.find((own) => own.version === task.aliases["current"]) ?? task.versions[0];
  return current?.tier ?? "";
}

interface Change {
  title: string;
  text?: string;
  action: string;
  danger?: boolean;
  run: () => Promise<void>;
}

function Detail(own: Session & { name: string; tenant: string | null; changed: () => void }): JSX.Element {
  const { api, name, tenant } = own;
  const [task, setTask] = useState<Task | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [change, setChange] = useState<Change | null>(null);
  const [said, setSaid] = useState("");
  const read = useCallback(() => api.task(name, tenant).then(setTask, setError), [api, name, tenant]);
  useEffect(() => void read(), [read]);
  const { role, tenant: mine } = own.server.caller;
  const owner = task === null ? null : task.tenant;
  const registered = task !== null && task.versions.some((one) => /^[0-9a-f]{64}$/.test(one.digest));
  const whose = tenant ?? mine;
  const may = registered && role !== "infer" && (whose === "shared" ? owner === null : owner === whose);
  const ask = (method: string, path: string, body?: unknown) =>
    api.send(method, `${of(name)}${path}`, { tenant }, body).then(() => undefined);
  const done = (text: string, gone = false) => {
    setSaid(text);
    own.changed();
    if (gone) location.hash = "#/tasks";
    else void read();
  };
  const change_ = (title: string, action: string, run: () => Promise<unknown>, more: Partial<Change> & { gone?: boolean } = {}) =>
    setChange({
      title,
      action,
      ...more,
      run: async () => {
        await run();
        done(`${title}: done.`, more.gone);
      },
    });
  const offer = { ask, change: change_, may };
  return (
    <section class="detail" aria-labelledby="task-title">
      <div class="bar">
        <h2 id="task-title">{name}</h2>
        <a class="button" href="#/tasks">
          Close
        </a>
      </div>
      <Problem error={error} />
      <p role="status" class="said">
        {said}
      </p>
      {task === null ? null : (
        <>
          <dl>
            <dt>Owner</dt>
            <dd>{task.tenant ?? "shared"}</dd>
            <dt>State</dt>
            <dd>{task.ready ? "ready" : "unloaded"}</dd>
            <dt>Pinned</dt>
            <dd>{task.pin ?? "no"}</dd>
          </dl>
          <div class="actions">
            {tenant === null ? (
              <a class="button primary" href={`#/try/${encodeURIComponent(name)}`}>
                Try
              </a>
            ) : null}
            {may ? <TaskActions {...own} task={task} offer={offer} /> : null}
          </div>
          <Versions task={task} offer={offer} />
          {Object.keys(task.aliases).map((alias) =>
            // Those of the bundle have no history, and nothing tells them from tasks that were published.
            owner === null ? null : (
              <History key={`${alias} ${task.aliases[alias]}`} {...own} task={task} alias={alias} offer={offer} />
            ),
          )}
        </>
      )}
      {change === null ? null : (
        <Confirm
          title={change.title}
          action={change.action}
          danger={change.danger ?? false}
          run={change.run}
          close={() => setChange(null)}
        >
          {change.text ? <p>{change.text}</p> : null}
        </Confirm>
      )}
    </section>
  );
}

interface Offer {
  ask: (method: string, path: string, body?: unknown) => Promise<void>;
  change: (title: string, action: string, run: () => Promise<unknown>, more?: Partial<Change> & { gone?: boolean }) => void;
  may: boolean;
}

function TaskActions(own: Session & { name: string; tenant: string | null; task: Task; offer: Offer }): JSX.Element {
  const { api, name, task, offer } = own;
  const model = `v2/repository/models/${encodeURIComponent(name)}`;
  const button = (text: string, run: () => Promise<unknown>, more: Partial<Change> & { gone?: boolean } = {}) => (
    <button
      type="button"
      class={more.danger ? "danger" : ""}
      onClick={() => offer.change(`${text} ${name}`, text, run, more)}
    >
      {text}
    </button>
  );
  return (
    <>
      {task.pin === "device" ? null : button("Pin", () => offer.ask("PUT", "/pin", { folded: false }), { text: "Keeps the current version on the device." })}
      {task.pin === "folded" ? null : button("Pin folded", () => offer.ask("PUT", "/pin", { folded: true }), { text: "Keeps the current version in a session of its own, merged into the base." })}
      {task.pin === null ? null : button("Unpin", () => offer.ask("DELETE", "/pin"))}
      {own.tenant !== null ? null : task.ready
        ? button("Unload", () => api.send("POST", `${model}/unload`, {}, {}), { text: "Requests for it are refused until it is loaded again." })
        : button("Load", () => api.send("POST", `${model}/load`, {}, {}))}
      {own.server.caller.role === "admin" && task.tenant !== null
        ? button("Publish", () => api.send("POST", `${of(name)}/publish`, { tenant: task.tenant }), { text: "Shares the task with all tenants. It then belongs to none of them.", gone: true })
        : null}
      {button("Delete", () => offer.ask("DELETE", ""), { danger: true, gone: true, text: "Deletes all versions. Requests that run finish." })}
    </>
  );
}

function Versions({ task, offer }: { task: Task; offer: Offer }): JSX.Element {
  const [alias, setAlias] = useState("current");
  const point = (version: string) => {
    const expected = task.aliases[alias];
    const body = { version, ...(expected === undefined ? {} : { expected }) };
    offer.change(`Point ${alias} at version ${version}`, "Point", () =>
      offer.ask("PUT", `/aliases/${encodeURIComponent(alias)}`, body),
    );
  };
  return (
    <>
      <div class="bar">
        <h3>Versions</h3>
        {offer.may ? (
          <Field label="Alias to point">
            <input value={alias} onInput={(event) => setAlias(event.currentTarget.value)} spellcheck={false} />
          </Field>
        ) : null}
      </div>
      <table>
        <thead>
          <tr>
            <th scope="col">Version</th>
            <th scope="col">Aliases</th>
            <th scope="col">Tier</th>
            <th scope="col">Digest</th>
            {offer.may ? <th scope="col">Change</th> : null}
          </tr>
        </thead>
        <tbody>
          {task.versions.toReversed().map((own) => {
            const names = Object.keys(task.aliases).filter((one) => task.aliases[one] === own.version);
            return (
              <tr key={own.version}>
                <td>{own.version}</td>
                <td>{names.join(", ")}</td>
                <td>
                  <Tier tier={own.tier} />
                </td>
                <td>
                  <code title={own.digest}>{own.digest.slice(0, 12)}</code>
                </td>
                {offer.may ? (
                  <td class="buttons">
                    <button
                      type="button"
                      disabled={alias === "" || task.aliases[alias] === own.version}
                      aria-label={`Point ${alias} at version ${own.version}`}
                      onClick={() => point(own.version)}
                    >
                      Point
                    </button>
                    <button
                      type="button"
                      class="danger"
                      disabled={names.length > 0}
                      aria-label={`Delete version ${own.version}`}
                      onClick={() =>
                        offer.change(`Delete version ${own.version}`, "Delete", () => offer.ask("DELETE", `/versions/${own.version}`), { danger: true })
                      }
                    >
                      Delete
                    </button>
                  </td>
                ) : null}
              </tr>
            );
          })}
        </tbody>
      </table>
    </>
  );
}

interface Pointed {
  version: string;
  time: number;
  key: string | null;
}

function History(own: Session & { tenant: string | null; name: string; task: Task; alias: string; offer: Offer }): JSX.Element | null {
  const { api, name, alias, tenant, task, offer } = own;
  const [found, setFound] = useState<Pointed[]>([]);
  useEffect(() => {
    const path = `${of(name)}/aliases/${encodeURIComponent(alias)}/history`;
    api.json<Pointed[]>("GET", path, { tenant }).then(setFound, () => setFound([]));
  }, [api, name, alias, tenant, task]);
  if (found.length === 0) return null;
  return (
    <>
      <div class="bar">
        <h3>History of {alias}</h3>
        {offer.may && found.length > 1 ? (
          <button
            type="button"
            onClick={() =>
              offer.change(`Roll ${alias} back from version ${task.aliases[alias]}`, "Roll back", () =>
                offer.ask("POST", `/aliases/${encodeURIComponent(alias)}/rollback`, { expected: task.aliases[alias] }),
              )
            }
          >
            Roll back {alias}
          </button>
        ) : null}
      </div>
      <table>
        <thead>
          <tr>
            <th scope="col">Version</th>
            <th scope="col">Since</th>
            <th scope="col">By key</th>
          </tr>
        </thead>
        <tbody>
          {found.map((one) => (
            <tr key={one.time}>
              <td>{one.version}</td>
              <td>{when(one.time)}</td>
              <td>{one.key === null ? "" : <code>{one.key}</code>}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </>
  );
}
