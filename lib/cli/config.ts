// Settings in files, YAML or the JSON that is a part of it, and the place in the file when a setting is refused.
import { readFile } from 'node:fs/promises';
import { basename } from 'node:path';
import { isCollection, isMap, isPair, isScalar, LineCounter, parseDocument, visit } from 'yaml';
import { InvalidArgumentError, InvalidFileError } from '../native/errors.js';

export const isMapping = (value: unknown): value is object =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

export class ConfigFile {
  private constructor(
    readonly file: string,
    readonly content: Readonly<Record<string, unknown>>,
    /** What messages call the whole content. */
    private readonly root: string,
    /** Line of every key, by its dotted path: `optimizer.betas.0`. */
    private readonly lines: ReadonlyMap<string, number>,
  ) {}

  /**
   * Reads a mapping with YAML 1.2's core schema: no tags, no merge keys.
   * @param root what messages of the API call the content, such as `recipe` in `recipe.kind`
   * @throws InvalidFileError with file and line when it cannot be read or is not YAML, or is no mapping of texts.
   */
  static async read(file: string, root: string): Promise<ConfigFile> {
    const text = await readFile(file, 'utf8').catch((cause) => {
      throw new InvalidFileError(`[config] cannot read ${file}: ${cause.message}`, { cause });
    });
    const lineCounter = new LineCounter();
    const document = parseDocument(text, { lineCounter, prettyErrors: false, version: '1.2' });
    const [problem] = [...document.errors, ...document.warnings];
    if (problem) {
      const { line } = lineCounter.linePos(problem.pos[0]);
      throw new InvalidFileError(`[config] ${file}, line ${line}: ${problem.message}`, { cause: problem });
    }
    if (!isMap(document.contents)) {
      throw new InvalidFileError(`[config] ${file} must hold keys with values, as in \`steps: 400\``);
    }
    const lines = new Map<string, number>();
    visit(document, (at, node, ancestors) => {
      const keys = [...ancestors, node].flatMap((item, i, all) => {
        if (isPair(item)) return [String(isScalar(item.key) ? item.key.value : item.key)];
        const parent = all[i - 1];
        return isCollection(parent) && !isMap(parent) ? [String(parent.items.indexOf(item as never))] : [];
      });
      const place = isPair(node) ? node.key : node;
      const range = (place as { range?: readonly number[] } | null)?.range;
      const path = keys.join('.');
      if (at !== 'value' && range && !lines.has(path)) lines.set(path, lineCounter.linePos(range[0]).line);
    });
    try {
      return new ConfigFile(file, document.toJS() as Record<string, unknown>, root, lines);
    } catch (cause) {
      throw new InvalidFileError(`[config] ${file}: ${(cause as Error).message}`, { cause });
    }
  }

  /**
   * Runs what checks the settings; an InvalidArgumentError about a key of the file comes out with file and line.
   * @param overridden dotted paths of keys that something else than the file has set
   */
  async blame<T>(overridden: readonly string[], run: () => Promise<T>): Promise<T> {
    try {
      return await run();
    } catch (error) {
      if (!(error instanceof InvalidArgumentError)) throw error;
      const path = this.#named(error.message);
      if (path === null || overridden.some((key) => path === key || path.startsWith(`${key}.`))) throw error;
      const line = this.lines.get(path);
      const place = `${basename(this.file)}${path === '' || line === undefined ? '' : `, line ${line}`}`;
      throw new InvalidArgumentError(`${error.message} (${place})`, { cause: error });
    }
  }

  // The path of the first key that a message names, in full or, where only one key has that name, by its last part;
  // '' when it names several keys or the whole content, null when none.
  #named(message: string): string | null {
    let fallback: string | null = null;
    for (const [word] of message.replace(/^\[\w+\] /, '').matchAll(/[A-Za-z_]\w*(?:\.\w+|\[\d+\])*/g)) {
      const [first, ...rest] = word.replaceAll(/\[(\d+)\]/g, '.$1').split('.');
      const path = (first === this.root ? rest : [first, ...rest]).join('.');
      if (path === '' || first === this.root) fallback = '';
      if (path === '') continue;
      if (this.lines.has(path)) return path;
      const named = [...this.lines.keys()].filter((key) => key.endsWith(`.${path}`));
      if (named.length === 1) return named[0];
      if (named.length > 1) fallback = '';
    }
    return fallback;
  }
}
