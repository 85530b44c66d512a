/** Try a task, or the same input under two tasks side by side. */

import type { JSX } from "preact";
import { useEffect, useMemo, useState } from "preact/hooks";
import { CallPane } from "./call";
import { ChatPane } from "./chat";
import type { Session } from "./main";
import { useTasks } from "./tasks";
import { TensorPane } from "./tensorform";
import { Field, Problem } from "./ui";

const KINDS: Record<string, string> = {
  chat: "Chat",
  completions: "Completion",
  embeddings: "Embeddings",
  classify: "Classes",
  tensors: "Tensors",
};

export interface PaneProps extends Session {
  /** The tasks to ask, one or two. */
  tasks: string[];
}

export function TryPage(own: Session & { rest: string }): JSX.Element {
  const kinds = [...Object.keys(KINDS).filter((kind) => own.server.text.includes(kind)), "tensors"];
  const [kind, setKind] = useState(kinds[0]!);
  const [first, setFirst] = useState(own.rest || "base");
  const [second, setSecond] = useState("base");
  const [both, setBoth] = useState(false);
  const [component, setComponent] = useState(own.server.components[0] ?? "");
  const { tasks, error } = useTasks(own, null);
  const names = useMemo(() => tasks.filter((task) => task.name !== own.server.bundle).map((task) => task.name), [tasks]);
  useEffect(() => {
    if (own.rest !== "") setFirst(own.rest);
  }, [own.rest]);
  const chosen = useMemo(() => (both ? [first, second] : [first]), [both, first, second]);
  const models = useMemo(
    () => (kind === "tensors" && component !== "" ? chosen.map((name) => `${name}/${component}`) : chosen),
    [chosen, kind, component],
  );
  const Pane = kind === "chat" ? ChatPane : kind === "tensors" ? TensorPane : CallPane;
  return (
    <main>
      <div class="bar">
        <h1>Try</h1>
        <TaskField label="Task" value={first} set={setFirst} names={names} />
        {both ? <TaskField label="Second task" value={second} set={setSecond} names={names} /> : null}
        <label class="check">
          <input type="checkbox" checked={both} onChange={(event) => setBoth(event.currentTarget.checked)} />
          Side by side
        </label>
        {kinds.length > 1 ? (
          <Field label="Call">
            <select value={kind} onChange={(event) => setKind(event.currentTarget.value)}>
              {kinds.map((one) => (
                <option value={one} key={one}>
                  {KINDS[one]}
                </option>
              ))}
            </select>
          </Field>
        ) : null}
        {kind === "tensors" && own.server.components.length > 0 ? (
          <Field label="Component">
            <select value={component} onChange={(event) => setComponent(event.currentTarget.value)}>
              {own.server.components.map((one) => (
                <option value={one} key={one}>
                  {one}
                </option>
              ))}
            </select>
          </Field>
        ) : null}
      </div>
      <Problem error={error} />
      <Pane key={kind} api={own.api} server={own.server} tasks={models} kind={kind} />
    </main>
  );
}

const SHOWN = 50;

function TaskField(props: { label: string; value: string; set: (name: string) => void; names: string[] }): JSX.Element {
  const [text, setText] = useState(props.value);
  useEffect(() => setText(props.value), [props.value]);
  const list = `names-${props.label.replaceAll(" ", "-")}`;
  const wanted = text.toLowerCase();
  const offered = props.names.filter((name) => name.toLowerCase().includes(wanted) || text === props.value).slice(0, SHOWN);
  return (
    <Field label={props.label}>
      <input
        list={list}
        value={text}
        spellcheck={false}
        autocomplete="off"
        onInput={(event) => {
          setText(event.currentTarget.value);
          if (props.names.includes(event.currentTarget.value)) props.set(event.currentTarget.value);
        }}
        onChange={(event) => props.set(event.currentTarget.value)}
      />
      <datalist id={list}>
        {offered.map((name) => (
          <option value={name} key={name} />
        ))}
      </datalist>
    </Field>
  );
}
