/** Charts as SVG, each with its last value as text. */

import type { ComponentChildren, JSX } from "preact";

const WIDTH = 300;
const HEIGHT = 80;

export interface Series {
  name: string;
  values: readonly (number | null)[];
}

export function Card(props: { title: string; now?: string | undefined; children: ComponentChildren }): JSX.Element {
  return (
    <figure class="card">
      <figcaption>
        <span>{props.title}</span>
        {props.now === undefined ? null : <strong>{props.now}</strong>}
      </figcaption>
      {props.children}
    </figure>
  );
}

/** Lines over time. `points` samples fill the width; the newest is on the right. */
export function Lines(props: { title: string; series: Series[]; unit: (value: number) => string; points: number; least?: number }) {
  const known = props.series.flatMap((own) => own.values.filter((value) => value !== null));
  const most = nice(Math.max(props.least ?? 1, ...known));
  const last = (own: Series) => own.values.findLast((value) => value !== null) ?? null;
  const now = props.series.map((own) => `${props.series.length > 1 ? `${own.name} ` : ""}${shown(last(own), props.unit)}`);
  return (
    <Card title={props.title} now={props.series.length > 1 ? undefined : now[0]}>
      <div class="plot">
        <span class="axis">{props.unit(most)}</span>
        <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" role="img" aria-label={`${props.title}: ${now.join(", ")}`}>
          <line class="grid" x1="0" x2={WIDTH} y1={HEIGHT / 2} y2={HEIGHT / 2} />
          <line class="grid" x1="0" x2={WIDTH} y1={HEIGHT - 0.5} y2={HEIGHT - 0.5} />
          {props.series.map((own, at) => (
            <path key={own.name} class={`line series-${at}`} d={path(own.values, most, props.points)} />
          ))}
        </svg>
      </div>
      {props.series.length > 1 ? (
        <div class="legend">
          {props.series.map((own, at) => (
            <span key={own.name}>
              <i class={`swatch series-${at}`} /> {own.name} <strong>{shown(last(own), props.unit)}</strong>
            </span>
          ))}
        </div>
      ) : null}
    </Card>
  );
}

function path(values: readonly (number | null)[], most: number, points: number): string {
  const step = WIDTH / Math.max(1, points - 1);
  const begin = WIDTH - (values.length - 1) * step;
  let pen = false;
  let found = "";
  values.forEach((value, at) => {
    if (value !== null) {
      const y = HEIGHT - 1 - ((HEIGHT - 4) * value) / most;
      found += `${pen ? "L" : "M"}${(begin + at * step).toFixed(1)} ${y.toFixed(1)}`;
    }
    pen = value !== null;
  });
  return found;
}

/** Shares of a whole, as one bar for each name. */
export function Shares(props: { title: string; rows: [string, number][]; unit: (value: number) => string }): JSX.Element {
  const most = Math.max(1e-9, ...props.rows.map(([, value]) => value));
  const all = props.rows.reduce((sum, [, value]) => sum + value, 0);
  return (
    <Card title={props.title} now={props.unit(all)}>
      {props.rows.length === 0 ? <p class="quiet">Nothing yet.</p> : null}
      <table class="bars" aria-label={props.title}>
        <tbody>
          {props.rows.map(([name, value]) => (
            <tr key={name}>
              <th scope="row" title={name}>
                {name}
              </th>
              <td class="bar-cell">
                <svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
                  <rect class="plus" width={(100 * value) / most} height="8" rx="1" />
                </svg>
              </td>
              <td class="number">{props.unit(value)}</td>
            </tr>
          ))}
        </tbody>
      </table>
    </Card>
  );
}

function shown(value: number | null, unit: (value: number) => string): string {
  return value === null ? "–" : unit(value);
}

/** The next of 1, 2 and 5 times a power of ten. */
function nice(value: number): number {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((own) => own * power).find((own) => own >= value * 0.999)!;
}
