// Sizes of a shape: constants (plain numbers), set by the caller at each run, or produced by an op while it runs.

/**
 * A size that is not known when the graph is built. Two dims are the same only when they are the same object. `bound` is
 * the largest value it can take: memory is planned for it.
 */
export interface Dim {
  readonly kind: 'set' | 'produced';
  readonly name: string;
  readonly bound: number;
}

export type Size = number | Dim;
/** Sizes of every axis, outermost first. Rank 1 to 4. */
export type Shape = readonly Size[];

/** The largest value of a size. */
export const boundOf = (size: Size): number => (typeof size === 'number' ? size : size.bound);

export function sameShape(a: Shape, b: Shape): boolean {
  return a.length === b.length && a.every((size, i) => size === b[i]);
}

/** `[rows<=512,64]`: constants as they are, other dims with name and bound. */
export function formatShape(shape: Shape): string {
  return `[${shape.map(formatSize).join(',')}]`;
}

export function formatSize(size: Size): string {
  return typeof size === 'number' ? `${size}` : `${size.name}<=${size.bound}`;
}
