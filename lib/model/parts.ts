// Parts of the stacks of an encoder-decoder model: its layers, and modules that stand for several of them (Modular Transformers, arXiv 2306.02379).

/** A side of an encoder-decoder model. */
export type Stack = 'encoder' | 'decoder';
export const stacks: readonly Stack[] = ['encoder', 'decoder'];

/** Consecutive layers of a stack, counted from 0, both included. */
export interface Span {
  readonly first: number;
  readonly last: number;
}

/** The spans that a model has modules for: each one layer of the stack's shape. */
export type Modules = Readonly<Record<Stack, readonly Span[]>>;

/** Which parts run, in their order: `'2'` is a layer, `'2-3'` the module that stands for layers 2 and 3. */
export type Assembly = Readonly<Record<Stack, readonly string[]>>;

/** `2`, or `2-3`: the name of a part in assemblies, files and reports. */
export const partId = ({ first, last }: Span): string => (first === last ? `${first}` : `${first}-${last}`);

/** The layers of a part, or null for what is no name of one. */
export function spanOf(part: unknown): Span | null {
  const [, first, last = first] = /^(0|[1-9]\d*)(?:-([1-9]\d*))?$/.exec(String(part)) ?? [];
  if (first === undefined || typeof part !== 'string') return null;
  const span = { first: Number(first), last: Number(last) };
  return partId(span) === part && span.first <= span.last ? span : null;
}

/** Whether a part is a module. */
export const isModule = (part: string): boolean => part.includes('-');
