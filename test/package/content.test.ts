// What is in the tarball, how large it is, and what publint says of its manifest.
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { publint } from 'publint';
import { formatMessage } from 'publint/utils';
import { expect, inject, it } from 'vitest';
import { root } from './tools.js';

const packed = inject('packed');
const paths = packed.files.map(({ path }) => path);

it('has what runs, what builds and what explains, and nothing else', () => {
  const expected = [
    /^(LICENSE|README\.md|package\.json|CMakeLists\.txt|scripts\/install\.cjs)$/,
    /^dist\/[\w/-]+\.(js|js\.map|d\.ts)$/,
    /^native\/(?!test\/)[\w/-]+\.(cc|cu|cuh|h|json|map)$/,
    /^models\/tiny\/[\w.-]+$/,
    /^examples\/[\w./-]+$/,
    /^prebuilds\/[a-z0-9]+-[a-z0-9]+\/elastiform(\.glibc)?\.node$/,
  ];
  expect(paths.filter((path) => !expected.some((pattern) => pattern.test(path)))).toEqual([]);
  for (const pattern of expected)
    expect(
      paths.some((path) => pattern.test(path)),
      `${pattern}`,
    ).toBe(true);
});

it('has every source that CMakeLists.txt names outside tests', () => {
  const named = readFileSync(join(root, 'CMakeLists.txt'), 'utf8').match(/native\/(?!test\/)[\w./]+\.\w+/g) ?? [];
  expect(named.length).toBeGreaterThan(50);
  expect(named.filter((path) => !paths.includes(path))).toEqual([]);
});

it('has a compiled file for every source, and none of a source that is gone', () => {
  const sources = execFileSync('git', ['ls-files', '-co', '--exclude-standard', 'lib'], { cwd: root, encoding: 'utf8' })
    .trim()
    .split('\n');
  const compiled = paths.filter((path) => /^dist\/.*\.js$/.test(path));
  expect(compiled.sort()).toEqual(sources.map((path) => path.replace(/^lib\/(.*)\.ts$/, 'dist/$1.js')).sort());
});

it('is smaller than 25 MB', () => {
  const prebuilds = packed.files.filter(({ path }) => path.startsWith('prebuilds/'));
  const megabytes = (bytes: number) => `${(bytes / 1e6).toFixed(2)} MB`;
  console.log(`tarball: ${megabytes(packed.size)} packed, ${megabytes(packed.unpackedSize)} in ${paths.length} files`);
  for (const { path, size } of prebuilds) console.log(`  ${path}: ${megabytes(size)}`);
  expect(packed.size).toBeLessThan(25e6);
});

it('passes publint --strict', async () => {
  const { messages, pkg } = await publint({ pkgDir: root, strict: true, pack: 'npm' });
  expect(messages.map((message) => formatMessage(message, pkg))).toEqual([]);
});
