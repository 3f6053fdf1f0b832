// Directories that go away with the test file.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';

const made: string[] = [];
// Once, where the file is collected: a hook that a running test adds is never called.
afterAll(() => {
  for (const path of made) rmSync(path, { recursive: true, force: true });
});

/** A fresh directory, removed after the tests of the file. */
export function temporaryDirectory(): string {
  const path = mkdtempSync(join(tmpdir(), 'elastiform-'));
  made.push(path);
  return path;
}
