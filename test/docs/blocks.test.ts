// The documents: what they show compiles against the package, what they link to exists, and no typed error is left out.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { describe, expect, test } from 'vitest';
import * as errors from '../../lib/native/errors.js';

const root = resolve(import.meta.dirname, '../..');
const pages = readdirSync(join(root, 'docs'), { encoding: 'utf8', recursive: true })
  .filter((path) => path.endsWith('.md') && dirname(path).split(/[/\\]/)[0] !== 'api')
  .map((path) => join('docs', path));
const documents = ['README.md', 'CONTRIBUTING.md', ...pages].map((path) => ({
  path,
  text: readFileSync(join(root, path), 'utf8'),
}));

/** What blocks may use without having made it. */
const globals = `
declare const model: import('elastiform').ElasticModel;
declare const texts: string[];
declare const ids: number[];
declare const heldOut: string;
`;

test('code blocks and examples compile', () => {
  const work = join(root, 'build/docs');
  rmSync(work, { recursive: true, force: true });
  mkdirSync(work, { recursive: true });
  let blocks = 0;
  for (const { path, text } of documents) {
    for (const [, code] of text.matchAll(/^```(?:ts|js)\n(.*?)^```$/gms)) {
      // Named after the document, so that an error says where it is.
      writeFileSync(join(work, `${path.replaceAll(/[/\\.]/g, '-')}-${blocks++}.ts`), `export {};\n${code}`);
    }
  }
  expect(blocks).toBeGreaterThan(3);
  writeFileSync(join(work, 'globals.d.ts'), globals);
  const config = {
    extends: '../../tsconfig.json',
    compilerOptions: { noUnusedLocals: false, allowJs: true, checkJs: true, rootDir: '../..' },
    include: ['*.ts', '../../examples/*.mjs'],
  };
  writeFileSync(join(work, 'tsconfig.json'), JSON.stringify(config));
  const tsc = join(root, 'node_modules/typescript/bin/tsc');
  const { stdout, status } = spawnSync(process.execPath, [tsc, '-p', work], { encoding: 'utf8' });
  expect(stdout).toBe('');
  expect(status).toBe(0);
});

describe('links lead somewhere', () => {
  /** GitHub's name of a heading. */
  const anchor = (heading: string) =>
    heading
      .trim()
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N}\s_-]/gu, '')
      .replaceAll(' ', '-');
  test.each(documents)('$path', ({ path, text }) => {
    for (const [, target] of text.matchAll(/\]\((?!https?:|mailto:)([^)\s]+)\)/g)) {
      const [file, fragment] = target.split('#');
      const at = file ? resolve(root, dirname(path), file) : join(root, path);
      expect(existsSync(at), `${path} links to ${target}`).toBe(true);
      if (!fragment || relative(root, at).startsWith(join('docs', 'api'))) continue;
      const headings = [...readFileSync(at, 'utf8').matchAll(/^#+ (.*)$/gm)].map(([, heading]) => anchor(heading));
      expect(headings, `${path} links to ${target}`).toContain(fragment);
    }
  });
});

test('troubleshooting has every class of error, and the index every document', () => {
  const page = readFileSync(join(root, 'docs/troubleshooting.md'), 'utf8');
  const classes = Object.keys(errors).filter((name) => name.endsWith('Error') && name !== 'ElastiformError');
  expect(classes.length).toBeGreaterThan(8);
  for (const name of [...classes, 'FileSystemError', 'DivergedError']) expect(page).toContain(`\`${name}\``);
  const index = readFileSync(join(root, 'docs/README.md'), 'utf8');
  for (const { path } of documents) {
    const link = relative('docs', path).replaceAll('\\', '/');
    if (path.startsWith('docs') && link !== 'README.md')
      expect(index, `docs/README.md has no ${link}`).toContain(`(${link})`);
  }
});

test('what TypeScript and the reference see of the package is what it has', async () => {
  const [seen, there] = await Promise.all([import('../../lib/api.js'), import('../../lib/index.js')]);
  expect(Object.keys(there).sort()).toEqual(Object.keys(seen).sort());
});
