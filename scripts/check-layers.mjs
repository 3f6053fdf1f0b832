// Fails when an import in lib/ goes against the direction of docs/architecture.md.
import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const lib = resolve(dirname(fileURLToPath(import.meta.url)), '../lib');

// Each folder may import from itself and from the folders listed.
const allowed = {
  native: [],
  graph: ['native'],
  kernels: ['native', 'graph'],
  io: ['native'],
  model: ['native', 'graph', 'io'],
  elastic: ['native', 'graph', 'io', 'model'],
  infer: ['native', 'graph', 'io', 'model', 'elastic'],
  distill: ['native', 'graph', 'io', 'model', 'elastic', 'infer'],
  report: [],
  cli: ['native', 'graph', 'io', 'model', 'elastic', 'infer', 'distill', 'report'],
};

const errors = [];
for (const entry of readdirSync(lib, { recursive: true })) {
  const file = entry.toString();
  if (!file.endsWith('.ts') || file === 'index.ts' || file === 'api.ts') continue;
  const folder = file.split(/[\\/]/)[0];
  if (!(folder in allowed)) {
    errors.push(`${file}: folder ${folder} is not in scripts/check-layers.mjs`);
    continue;
  }
  const source = readFileSync(join(lib, file), 'utf8');
  for (const [, target] of source.matchAll(/(?:from|import)\s*\(?\s*'(\.[^']+)'/g)) {
    const to = relative(lib, resolve(lib, dirname(file), target)).split(/[\\/]/)[0];
    if (to !== folder && to !== 'index.js' && !allowed[folder].includes(to)) {
      errors.push(`lib/${file} imports ${target}: ${folder} may not use ${to}`);
    }
  }
}
if (errors.length > 0) {
  console.error(errors.join('\n'));
  process.exit(1);
}
console.log('layers: imports run one way');
