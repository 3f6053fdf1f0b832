// Documents named on the command line.
import { basename } from 'node:path';
import { type DataSource, readDocuments } from '../distill/data.js';
import { type CommandContext, UsageError } from './command.js';

const separator = '<|endoftext|>';

/** Flags of commands that read documents. */
export const dataFlags = {
  data: {
    type: 'string',
    value: 'FILE,...',
    help: 'text or .jsonl files; <|endoftext|> separates documents in a text',
  },
  field: { type: 'string', value: 'NAME', help: 'field of the .jsonl lines that holds the text (default: text)' },
} as const;

/** Documents of the files a flag lists, or null without the flag. */
export async function documentsOf(context: CommandContext, flag: string): Promise<string[] | null> {
  const files = context.flags.list(flag);
  if (!files) return null;
  const lines = files.filter((file) => file.endsWith('.jsonl'));
  if (lines.length > 0 && lines.length < files.length) {
    throw new UsageError(`[cli] --${flag} must list text files or .jsonl files, not both`);
  }
  const field = context.flags.string('field');
  if (field !== undefined && lines.length === 0) throw new UsageError('[cli] --field is for .jsonl files');
  return lines.length > 0 ? readDocuments({ kind: 'jsonl', files, ...(field ? { field } : {}) }) : readTexts(files);
}

/** Names of the files a flag lists, without their folders. */
export const fileNames = ({ flags }: CommandContext, flag: string): string =>
  (flags.list(flag) ?? []).map((file) => basename(file)).join(', ');

/** Documents of text files. */
export async function readTexts(files: readonly string[]): Promise<string[]> {
  const texts = await readDocuments({ kind: 'text', files });
  return texts.flatMap((text) =>
    (text.includes(separator) ? text.split(separator) : [text]).filter((d) => d.trim() !== ''),
  );
}

export async function dataSource(context: CommandContext, flag: string): Promise<DataSource | null> {
  const documents = await documentsOf(context, flag);
  return documents && { kind: 'documents', documents };
}
