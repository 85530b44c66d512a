/** The console: sign in, pages, theme. */

import type { JSX } from "preact";
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { Api, type Server } from "./api";
import { AuditPage } from "./audit";
import { LivePage } from "./live";
import "./style.css";
import { TasksPage } from "./tasks";
import { TryPage } from "./try";
import { Field, Problem } from "./ui";
import { UploadPage } from "./upload";

export interface Session {
  api: Api;
  server: Server;
}

const PAGES: { path: string; title: string; for: string[]; page: (own: Session & { rest: string }) => JSX.Element }[] = [
  { path: "tasks", title: "Tasks", for: ["infer", "deploy", "admin"], page: TasksPage },
  { path: "upload", title: "Upload", for: ["deploy", "admin"], page: UploadPage },
  { path: "try", title: "Try", for: ["infer", "deploy", "admin"], page: TryPage },
  { path: "live", title: "Live", for: ["infer", "deploy", "admin"], page: LivePage },
  { path: "audit", title: "Audit", for: ["admin"], page: AuditPage },
];

function useHash(): string {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const look = () => setHash(location.hash);
    addEventListener("hashchange", look);
    return () => removeEventListener("hashchange", look);
  }, []);
  return hash;
}

const THEMES = ["system", "light", "dark"] as const;

function Theme(): JSX.Element {
  const [theme, setTheme] = useState<string>(() => localStorage.getItem("theme") ?? "system");
  useEffect(() => {
    localStorage.setItem("theme", theme);
    if (theme === "system") delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = theme;
  }, [theme]);
  return (
    <select aria-label="Theme" value={theme} onChange={(event) => setTheme(event.currentTarget.value)}>
      {THEMES.map((own) => (
        <option value={own} key={own}>
          {own[0]!.toUpperCase() + own.slice(1)}
        </option>
      ))}
    </select>
  );
}

function SignIn({ enter, error }: { enter: (key: string) => void; error: unknown }): JSX.Element {
  const [key, setKey] = useState("");
  return (
    <main class="sign-in">
      <h1>tpeft_deploy</h1>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          enter(key.trim());
        }}
      >
        <Field label="Key" hint="Kept in this tab until it is closed or reloaded, and sent to this server only.">
          <input
            type="password"
            value={key}
            onInput={(event) => setKey(event.currentTarget.value)}
            autocomplete="off"
            spellcheck={false}
            required
          />
        </Field>
        <button class="primary">Sign in</button>
      </form>
      <Problem error={error} />
    </main>
  );
}

function App(): JSX.Element | null {
  const [session, setSession] = useState<Session | null>(null);
  const [asked, setAsked] = useState(false);
  const [error, setError] = useState<unknown>(null);
  const hash = useHash();
  const [path = "", ...rest] = hash.replace(/^#\//, "").split("/");
  const enter = async (key: string) => {
    const api = new Api(key);
    try {
      setSession({ api, server: await api.server() });
      setError(null);
    } catch (found) {
      setError(found);
    }
    setAsked(true);
  };
  useEffect(() => {
    const begin = async () => {
      const { keys } = await new Api("").json<{ keys: boolean }>("GET", "console/server.json");
      if (keys) setAsked(true);
      else await enter("");
    };
    begin().catch((found: unknown) => {
      setError(found);
      setAsked(true);
    });
  }, []);
  const pages = PAGES.filter((own) => session !== null && own.for.includes(session.server.caller.role));
  const shown = pages.find((own) => own.path === path) ?? pages[0];
  useEffect(() => {
    document.title = `${shown?.title ?? "Sign in"} - tpeft_deploy console`;
  }, [shown]);
  if (!asked) return null;
  if (session === null || shown === undefined) {
    return (
      <>
        <header class="top">
          <span class="brand">tpeft_deploy</span>
          <Theme />
        </header>
        <SignIn enter={enter} error={error} />
      </>
    );
  }
  const { caller, bundle } = session.server;
  return (
    <>
      <header class="top">
        <a class="brand" href="#/tasks">
          {bundle}
        </a>
        <nav aria-label="Pages">
          {pages.map((own) => (
            <a href={`#/${own.path}`} aria-current={own === shown ? "page" : undefined} key={own.path}>
              {own.title}
            </a>
          ))}
        </nav>
        <span class="who">
          {caller.tenant} <span class="quiet">{caller.role}</span>
        </span>
        <Theme />
        <button type="button" onClick={() => setSession(null)}>
          Sign out
        </button>
      </header>
      <shown.page key={shown.path} {...session} rest={decode(rest.join("/"))} />
    </>
  );
}

function decode(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

render(<App />, document.getElementById("app")!);
