// Lines of a text file, read as they are needed.
import { createReadStream } from 'node:fs';
import { InvalidFileError } from '../native/errors.js';

export interface FileLine {
  /** From 1. */
  readonly number: number;
  readonly text: string;
  /** Of the file, so far. */
  readonly bytesRead: number;
}

/**
 * The lines of a file of any size, without their ends.
 *
 * @throws InvalidFileError naming the file that cannot be read or is not UTF-8.
 */
export async function* fileLines(file: string): AsyncGenerator<FileLine> {
  const stream = createReadStream(file);
  const decoder = new TextDecoder('utf-8', { fatal: true });
  let number = 0;
  let open = '';
  const line = (text: string): FileLine => ({
    number: ++number,
    text: text.endsWith('\r') ? text.slice(0, -1) : text,
    bytesRead: stream.bytesRead,
  });
  const chunks = stream[Symbol.asyncIterator]();
  try {
    for (;;) {
      const parts = await nextText(file, chunks, decoder);
      if (!parts) break;
      open += parts[0];
      for (const next of parts.slice(1)) {
        yield line(open);
        open = next;
      }
    }
  } finally {
    stream.destroy();
  }
  if (open !== '') yield line(open);
}

/** The next piece of a file, cut at line ends; null: it ended. */
async function nextText(
  file: string,
  chunks: AsyncIterator<Buffer>,
  decoder: InstanceType<typeof TextDecoder>,
): Promise<string[] | null> {
  try {
    const chunk = await chunks.next();
    if (!chunk.done) return decoder.decode(chunk.value, { stream: true }).split('\n');
    decoder.decode();
    return null;
  } catch (cause) {
    throw new InvalidFileError(`[files] cannot read ${file} as UTF-8 text: ${(cause as Error).message}`, { cause });
  }
}
