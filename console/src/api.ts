/** Calls of the server's REST API. The key is kept in this object only, so a reload of the page forgets it. */

export interface Version {
  version: string;
  digest: string;
  tier: string;
}

export interface Task {
  name: string;
  tenant: string | null;
  aliases: Record<string, string>;
  versions: Version[];
  ready: boolean;
  pin: "device" | "folded" | null;
}

export interface Server {
  name: string;
  version: string;
  bundle: string;
  components: string[];
  text: string[];
  caller: { tenant: string; role: "infer" | "deploy" | "admin" };
}

export interface Tensor {
  name: string;
  datatype: string;
  shape: number[];
  data?: unknown[];
}

export interface Model {
  name: string;
  inputs: Tensor[];
  outputs: Tensor[];
}

export interface Tenant {
  name: string;
  quota: Record<string, number | null>;
  used: Record<string, number>;
}

export interface AuditEntry {
  id: number;
  time: number;
  tenant: string;
  key: string;
  action: string;
  target: string;
  detail: Record<string, unknown>;
}

/** A request that was not answered with success. The message is the server's text, whole. */
export class Refusal extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly retryAfter: string | null = null,
    readonly request: string | null = null,
  ) {
    super(message);
  }
}

type Query = Record<string, string | number | null | undefined>;

const root = new URL("..", document.baseURI);

export class Api {
  readonly #key: string;

  constructor(key: string) {
    this.#key = key;
  }

  url(path: string, query: Query = {}): URL {
    const found = new URL(path, root);
    for (const [name, value] of Object.entries(query)) {
      if (value !== null && value !== undefined) found.searchParams.set(name, String(value));
    }
    return found;
  }

  headers(): Record<string, string> {
    return this.#key === "" ? {} : { Authorization: `Bearer ${this.#key}` };
  }

  async send(method: string, path: string, query: Query = {}, body?: unknown, signal?: AbortSignal): Promise<Response> {
    const request: RequestInit = {
      method,
      headers: body === undefined ? this.headers() : { ...this.headers(), "Content-Type": "application/json" },
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
      referrerPolicy: "no-referrer",
    };
    if (body !== undefined) request.body = JSON.stringify(body);
    if (signal !== undefined) request.signal = signal;
    let answer: Response;
    try {
      answer = await fetch(this.url(path, query), request);
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Refusal("The server does not answer.", 0);
    }
    if (!answer.ok) {
      const text = await answer.text();
      throw refusal(answer.status, text, answer.headers.get("retry-after"), answer.headers.get("x-request-id"));
    }
    return answer;
  }

  async json<T>(method: string, path: string, query: Query = {}, body?: unknown, signal?: AbortSignal): Promise<T> {
    return (await this.send(method, path, query, body, signal)).json() as Promise<T>;
  }

  server(): Promise<Server> {
    return this.json("GET", "v2");
  }

  tasks(tenant: string | null, after: string | null, limit: number, signal?: AbortSignal): Promise<Task[]> {
    return this.json("GET", "v2/registry/tasks", { tenant, after, limit }, undefined, signal);
  }

  task(name: string, tenant: string | null): Promise<Task> {
    return this.json("GET", of(name), { tenant });
  }

  model(name: string): Promise<Model> {
    return this.json("GET", `v2/models/${encodeURIComponent(name)}`);
  }

  infer(name: string, inputs: Tensor[], signal?: AbortSignal): Promise<{ model_version: string; outputs: Tensor[] }> {
    return this.json("POST", `v2/models/${encodeURIComponent(name)}/infer`, {}, { inputs }, signal);
  }

  /** Upload an adapter; `progress` gets the sent part, 0 to 1. */
  upload(
    name: string,
    query: Query,
    files: Record<string, File>,
    progress: (part: number) => void,
    signal: AbortSignal,
  ): Promise<Task> {
    const form = new FormData();
    for (const [part, file] of Object.entries(files)) form.set(part, file, file.name);
    const request = new XMLHttpRequest(); // fetch tells nothing of what is sent
    request.open("POST", this.url(`${of(name)}/versions`, query));
    for (const [header, value] of Object.entries(this.headers())) request.setRequestHeader(header, value);
    request.upload.onprogress = (event) => progress(event.lengthComputable ? event.loaded / event.total : 0);
    request.upload.onload = () => progress(1);
    signal.addEventListener("abort", () => request.abort());
    return new Promise((resolve, reject) => {
      request.onerror = () => reject(new Refusal("The connection broke before the server's answer.", 0));
      request.onabort = () => reject(new Refusal("Cancelled. The server keeps nothing of an unfinished upload.", 0));
      request.onload = () => {
        if (request.status === 200) resolve(JSON.parse(request.responseText) as Task);
        else {
          const after = request.getResponseHeader("retry-after");
          reject(refusal(request.status, request.responseText, after, request.getResponseHeader("x-request-id")));
        }
      };
      request.send(form);
    });
  }

  /** Events of a stream of OpenAI's API. */
  async *events(path: string, body: unknown, signal: AbortSignal): AsyncGenerator<Record<string, unknown>> {
    const answer = await this.send("POST", path, {}, body, signal);
    const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data) as Record<string, unknown>;
        if (event["error"]) throw new Refusal(messageOf(event) ?? "The stream broke.", 200);
        yield event;
      }
    }
  }
}

export function of(name: string): string {
  return `v2/registry/tasks/${encodeURIComponent(name)}`;
}

export function refusal(status: number, text: string, after: string | null, request: string | null): Refusal {
  let message: string | null = null;
  try {
    message = messageOf(JSON.parse(text) as Record<string, unknown>);
  } catch {
    // A proxy's page is no JSON.
  }
  return new Refusal(message ?? (text.slice(0, 2000) || `The server answered ${status}.`), status, after, request);
}

function messageOf(document: Record<string, unknown>): string | null {
  const error = document["error"];
  if (typeof error === "string") return error;
  const message = (error as Record<string, unknown> | null)?.["message"];
  return typeof message === "string" ? message : null;
}
