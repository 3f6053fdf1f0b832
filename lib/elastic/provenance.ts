// Where a checkpoint comes from: its revision on the Hugging Face Hub and its licence, as far as its directory says.
import { existsSync } from 'node:fs';
import { readFile, realpath } from 'node:fs/promises';
import { join } from 'node:path';

export interface Provenance {
  /** Commit on the Hub. */
  revision?: string;
  /** As the model card names it, such as `apache-2.0`; `see LICENSE` when there only is such a file. */
  license?: string;
}

const commit = /^[0-9a-f]{40}$/;

export async function provenanceOf(dir: string): Promise<Provenance> {
  const revision = await revisionOf(dir);
  const license = await licenseOf(dir);
  return { ...(revision && { revision }), ...(license && { license }) };
}

// A cache of the Hub has the commit in its path; a download into a folder keeps it beside each file, on the first line.
async function revisionOf(dir: string): Promise<string | undefined> {
  const parts = (await realpath(dir)).split(/[\\/]/);
  const cached = parts.at(parts.lastIndexOf('snapshots') + 1);
  if (parts.includes('snapshots') && cached && commit.test(cached)) return cached;
  const metadata = join(dir, '.cache', 'huggingface', 'download', 'config.json.metadata');
  const [first] = (await textOf(metadata)).split(/\r?\n/);
  return commit.test(first) ? first : undefined;
}

async function licenseOf(dir: string): Promise<string | undefined> {
  const header = /^---\r?\n([\s\S]*?)\r?\n---/.exec(await textOf(join(dir, 'README.md')))?.[1] ?? '';
  const named = /^license:[ \t]*["']?([\w.+-]+)["']?[ \t]*$/m.exec(header)?.[1];
  const file = ['LICENSE', 'LICENSE.txt'].find((name) => existsSync(join(dir, name)));
  return named ?? (file && `see ${file}`);
}

const textOf = (path: string): Promise<string> => readFile(path, 'utf8').catch(() => '');
