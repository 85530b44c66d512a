/** Figures of the server at one moment, from /metrics or from the statistics of the models. */

export interface Line {
  name: string;
  labels: Record<string, string>;
  value: number;
}

export interface Histogram {
  count: number;
  sum: number;
  /** Upper bound of a size -> number of observations in it; not cumulative. */
  sizes: Map<number, number>;
}

export interface Sample {
  time: number;
  waitingRows: number | null;
  sequences: { running: number; waiting: number } | null;
  rows: Map<string, number>;
  tokens: Map<string, number>;
  prompts: number;
  batch: Histogram;
  run: Histogram;
  queue: Histogram;
  tiers: Record<string, number>;
  bytes: Record<string, number>;
}

/** Read Prometheus' text format. */
export function read(text: string): Line[] {
  const found: Line[] = [];
  for (const line of text.split("\n")) {
    const match = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (match === null) continue;
    const labels: Record<string, string> = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name!] = value!.replace(/\\(.)/g, (_, own: string) => (own === "n" ? "\n" : own));
    }
    found.push({ name: match[1]!, labels, value: Number(match[3]) });
  }
  return found;
}

/** The figures of /metrics. */
export function ofMetrics(text: string, time: number): Sample {
  const lines = Map.groupBy(read(text), (line) => line.name);
  const all = (name: string) => lines.get(name) ?? [];
  const one = (name: string) => all(name)[0]?.value ?? null;
  const by = (name: string, label: string) => {
    const found = new Map<string, number>();
    for (const { labels, value } of all(name)) found.set(labels[label] ?? "", (found.get(labels[label] ?? "") ?? 0) + value);
    return found;
  };
  const running = one("tpeft_running_sequences");
  return {
    time,
    waitingRows: one("tpeft_queue_rows"),
    sequences: running === null ? null : { running, waiting: one("tpeft_waiting_sequences") ?? 0 },
    rows: by("tpeft_rows_total", "tenant"),
    tokens: by("tpeft_generation_tokens_total", "tenant"),
    prompts: all("tpeft_prompt_tokens_total").reduce((sum, line) => sum + line.value, 0),
    batch: histogram(lines, "tpeft_batch_rows"),
    run: histogram(lines, "tpeft_run_seconds"),
    queue: histogram(lines, "tpeft_queue_seconds"),
    tiers: Object.fromEntries(by("tpeft_adapters", "tier")),
    bytes: Object.fromEntries(by("tpeft_adapter_bytes", "where")),
  };
}

function histogram(lines: Map<string, Line[]>, name: string): Histogram {
  const sizes = new Map<number, number>();
  let before = 0;
  for (const { labels, value } of lines.get(`${name}_bucket`) ?? []) {
    sizes.set(labels["le"] === "+Inf" ? Infinity : Number(labels["le"]), value - before);
    before = value;
  }
  return { count: lines.get(`${name}_count`)?.[0]?.value ?? 0, sum: lines.get(`${name}_sum`)?.[0]?.value ?? 0, sizes };
}

export interface Statistics {
  inference_count: number;
  inference_stats: Record<string, { count: number; ns: number }>;
  batch_stats: { batch_size: number; compute_infer: { count: number; ns: number } }[];
}

/** The figures of the models' statistics, which a key without the role admin reads. */
export function ofStatistics(models: Statistics[], tenant: string, tiers: Record<string, number>, time: number): Sample {
  const sizes = new Map<number, number>();
  const sum = (name: string, field: "count" | "ns") =>
    models.reduce((all, own) => all + (own.inference_stats[name]?.[field] ?? 0), 0);
  let [rows, runs] = [0, 0];
  for (const own of models) {
    for (const { batch_size: size, compute_infer: run } of own.batch_stats) {
      sizes.set(size, (sizes.get(size) ?? 0) + run.count);
      rows += size * run.count;
      runs += run.count;
    }
  }
  const times = (name: string): Histogram => ({ count: sum(name, "count"), sum: sum(name, "ns") / 1e9, sizes: new Map() });
  return {
    time,
    waitingRows: null,
    sequences: null,
    rows: new Map([[tenant, models.reduce((all, own) => all + own.inference_count, 0)]]),
    tokens: new Map(),
    prompts: 0,
    batch: { count: runs, sum: rows, sizes: new Map([...sizes].sort(([one], [other]) => one - other)) },
    run: times("compute_infer"),
    queue: times("queue"),
    tiers,
    bytes: {},
  };
}

/** Rate per second of a counter between neighbouring samples; a counter that fell began anew. */
export function rates(samples: readonly Sample[], value: (own: Sample) => number): (number | null)[] {
  return samples.map((own, at) => {
    const before = samples[at - 1];
    if (before === undefined) return null;
    const more = value(own) - value(before);
    return more < 0 ? null : more / Math.max(1e-3, own.time - before.time);
  });
}

/** Mean of the observations between neighbouring samples. */
export function means(samples: readonly Sample[], value: (own: Sample) => Histogram): (number | null)[] {
  return samples.map((own, at) => {
    const before = samples[at - 1];
    if (before === undefined) return null;
    const number = value(own).count - value(before).count;
    return number <= 0 ? null : (value(own).sum - value(before).sum) / number;
  });
}

/** Observations by size between the first and the last sample. */
export function sizes(samples: readonly Sample[], value: (own: Sample) => Histogram): [number, number][] {
  const [first, last] = [samples[0], samples[samples.length - 1]];
  if (first === undefined || last === undefined) return [];
  const before = value(first).sizes;
  return [...value(last).sizes].map(([size, number]) => [size, Math.max(0, number - (before.get(size) ?? 0))]);
}

/** What each name added between the first and the last sample, the largest first. */
export function added(samples: readonly Sample[], value: (own: Sample) => Map<string, number>): [string, number][] {
  const [first, last] = [samples[0], samples[samples.length - 1]];
  if (first === undefined || last === undefined) return [];
  const before = value(first);
  return [...value(last)]
    .map(([name, number]): [string, number] => [name, Math.max(0, number - (before.get(name) ?? 0))])
    .sort(([, one], [, other]) => other - one);
}
