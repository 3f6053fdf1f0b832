// The results of one run on one card: gathered while it goes on, so that a run cut short leaves what it measured.
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { judge } from './goals.mjs';

export const FORMAT = 1;

const FIELDS = {
  name: 'name',
  driver: 'driver_version',
  memory: 'memory.total',
  maxSmClock: 'clocks.max.sm',
  maxMemoryClock: 'clocks.max.mem',
  powerLimit: 'power.limit',
};
const NOW = { sm: 'clocks.sm', memory: 'clocks.mem', temperature: 'temperature.gpu', power: 'power.draw' };

function query(fields) {
  const args = [`--query-gpu=${Object.values(fields).join(',')}`, '--format=csv,noheader', '--id=0'];
  try {
    const line = execFileSync('nvidia-smi', args, {
      encoding: 'utf8',
      timeout: 10_000,
      stdio: ['ignore', 'pipe', 'ignore'],
    });
    const values = line.trim().split('\n')[0].split(', ');
    return Object.fromEntries(Object.keys(fields).map((name, i) => [name, values[i]]));
  } catch {
    return null;
  }
}

/** What does not change during a run, or null without a card. */
export const cardFacts = () => query(FIELDS);
/** Clocks, temperature and power at this moment. */
export const cardNow = () => query(NOW);

const slug = (name) =>
  name
    .toLowerCase()
    .replaceAll(/[^a-z0-9]+/g, '-')
    .replaceAll(/^-|-$/g, '');

/** A file of results that grows: `update` merges into it and writes it anew. */
export class Results {
  /** @param folder - where it lies; a run that has begun there goes on */
  constructor(folder, state) {
    this.folder = folder;
    this.data = state;
  }

  /** Begins, or goes on with what `work/results.json` holds. */
  static open(folder, work, manifest) {
    const file = path.join(work, 'results.json');
    const started = new Date().toISOString();
    const state = fs.existsSync(file)
      ? JSON.parse(fs.readFileSync(file, 'utf8'))
      : {
          format: FORMAT,
          started,
          commit: manifest.commit,
          card: cardFacts(),
          stages: [],
          facts: {},
          groups: {},
          goals: [],
        };
    const results = new Results(folder, state);
    results.work = file;
    return results;
  }

  get file() {
    const { card, started } = this.data;
    const time = started.slice(0, 16).replaceAll(/[:T]/g, '-');
    return path.join(this.folder, `${slug(card?.name ?? 'no card')}-${time}.json`);
  }

  /** Without a card nothing was measured, and no file of results is written. */
  update(change) {
    change(this.data);
    this.data.goals = judge(this.data.groups);
    const text = `${JSON.stringify(this.data, null, 1)}\n`;
    fs.writeFileSync(this.work, text);
    if (this.data.card && Object.keys(this.data.groups).length > 0) {
      fs.mkdirSync(this.folder, { recursive: true });
      fs.writeFileSync(this.file, text);
    }
  }
}
