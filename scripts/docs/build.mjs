// Generates the API reference, docs/api, from the comments in lib/:
//   npm run docs                writes it
//   npm run docs -- --check     fails when it is not what would be written
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';

const here = import.meta.dirname;
const committed = resolve(here, '../../docs/api');
const check = process.argv.includes('--check');
const run = (command, ...args) => {
  const { status } = spawnSync(command, args, { cwd: here, stdio: ['ignore', 2, 2] });
  if (status !== 0) process.exit(status ?? 1);
};

if (!existsSync(join(here, 'node_modules'))) run('npm', 'ci', '--ignore-scripts', '--no-audit', '--no-fund');
const out = check ? mkdtempSync(join(tmpdir(), 'elastiform-docs-')) : committed;
try {
  run(process.execPath, 'node_modules/typedoc/bin/typedoc', '--out', out);
  if (check) {
    const pages = (dir) =>
      (existsSync(dir) ? readdirSync(dir, { recursive: true }) : []).filter((name) => name.endsWith('.md'));
    const contents = (dir) =>
      pages(dir)
        .sort()
        .map((name) => [name, readFileSync(join(dir, name), 'utf8')]);
    if (JSON.stringify(contents(out)) !== JSON.stringify(contents(committed))) {
      console.error('docs/api is not what lib/ says: run `npm run docs` and commit what it writes');
      process.exitCode = 1;
    }
  }
} finally {
  if (check) rmSync(out, { recursive: true, force: true });
}
