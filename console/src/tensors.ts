/** Values of a model's inputs: from a form, from JSON or from an image. */

import type { Tensor } from "./api";

export interface ImageChoice {
  scale: "unit" | "signed" | "bytes" | "imagenet";
  height: number;
  width: number;
}

const INTEGERS = /^(U?INT\d+)$/;
const MEAN = [0.485, 0.456, 0.406];
const STD = [0.229, 0.224, 0.225];

/** Sizes of a tensor, with those that vary from a form. */
export function sized(input: Tensor, free: readonly number[]): number[] {
  let at = 0;
  return input.shape.map((size) => (size < 0 ? (free[at++] ?? 1) : size));
}

export function elements(shape: readonly number[]): number {
  return shape.reduce((all, size) => all * size, 1);
}

/** Values that are all the same, or random ones of a seed. */
export function filled(input: Tensor, shape: readonly number[], kind: "zeros" | "ones" | "random"): unknown[] {
  const number = elements(shape);
  if (input.datatype === "BYTES") return new Array<string>(number).fill("");
  if (input.datatype === "BOOL") return Array.from({ length: number }, (_, at) => (kind === "random" ? at % 2 === 0 : kind === "ones"));
  if (kind !== "random") return new Array<number>(number).fill(kind === "ones" ? 1 : 0);
  let state = 1;
  const next = () => {
    state = (state * 48271) % 2147483647;
    return state / 2147483647;
  };
  const whole = INTEGERS.test(input.datatype);
  return Array.from({ length: number }, () => (whole ? Math.floor(next() * 10) : Math.round((next() * 2 - 1) * 1e4) / 1e4));
}

/** Read JSON for an input: nested lists have their shape, and a flat list takes the given one. */
export function parsed(input: Tensor, text: string, shape: readonly number[]): Tensor {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`Input ${input.name} is no JSON: ${error instanceof Error ? error.message : String(error)}`);
  }
  if (!Array.isArray(value)) throw new Error(`Input ${input.name} is no list.`);
  const own: number[] = [];
  for (let level: unknown = value; Array.isArray(level); level = level[0]) own.push(level.length);
  const nested = own.length > 1 || input.shape.length === 1;
  return { name: input.name, datatype: input.datatype, shape: nested ? own : [...shape], data: value.flat(Infinity) };
}

export interface Layout {
  channels: number;
  last: boolean;
  height: number;
  width: number;
}

/** How an input takes images; null for one that takes none. Sizes that vary are -1. */
export function layout(input: Tensor): Layout | null {
  const sizes = input.shape.slice(-3);
  if (input.shape.length !== 4 || !/^(FP|UINT8)/.test(input.datatype)) return null;
  const [first, middle, end] = sizes as [number, number, number];
  if (first === 1 || first === 3) return { channels: first, last: false, height: middle, width: end };
  if (end === 1 || end === 3) return { channels: end, last: true, height: first, width: middle };
  return null;
}

/** Draw an image file in the size of an input, and return its values as one row. */
export async function pixels(input: Tensor, own: Layout, file: File, choice: ImageChoice): Promise<Tensor> {
  const { height, width } = choice;
  const canvas = document.createElement("canvas");
  canvas.height = height;
  canvas.width = width;
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  let image: ImageBitmap;
  try {
    image = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name} is no image that this browser reads.`);
  }
  context.drawImage(image, 0, 0, width, height);
  image.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const values = new Array<number>(own.channels * height * width);
  for (let at = 0; at < height * width; at++) {
    const [red, green, blue] = [rgba[4 * at]!, rgba[4 * at + 1]!, rgba[4 * at + 2]!];
    const channels = own.channels === 3 ? [red, green, blue] : [0.299 * red + 0.587 * green + 0.114 * blue];
    channels.forEach((value, channel) => {
      const place = own.last ? at * own.channels + channel : channel * height * width + at;
      values[place] = scaled(value, channel, choice.scale, input.datatype);
    });
  }
  const shape = own.last ? [1, height, width, own.channels] : [1, own.channels, height, width];
  return { name: input.name, datatype: input.datatype, shape, data: values };
}

function scaled(value: number, channel: number, scale: ImageChoice["scale"], datatype: string): number {
  if (datatype === "UINT8") return Math.round(value);
  if (scale === "bytes") return value;
  const unit = value / 255;
  const found = scale === "signed" ? 2 * unit - 1 : scale === "imagenet" ? (unit - MEAN[channel]!) / STD[channel]! : unit;
  return Math.round(found * 1e6) / 1e6;
}

/** Largest difference between two outputs of one shape; null where they cannot be compared. */
export function difference(one: Tensor, other: Tensor | undefined): number | null {
  if (other === undefined || String(one.shape) !== String(other.shape)) return null;
  const [a, b] = [one.data ?? [], other.data ?? []];
  let most = 0;
  for (let at = 0; at < a.length; at++) {
    const [x, y] = [a[at], b[at]];
    if (typeof x !== "number" || typeof y !== "number") return null;
    most = Math.max(most, Math.abs(x - y));
  }
  return most;
}
