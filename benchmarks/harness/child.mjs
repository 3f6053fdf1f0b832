// The coordinator's side of a benchmark child: start, ask, stop.
import { spawn } from 'node:child_process';
import path from 'node:path';
import readline from 'node:readline';
import { fileURLToPath } from 'node:url';

const workers = path.join(path.dirname(fileURLToPath(import.meta.url)), '..', 'workers');

export class Child {
  #process;
  #waiting = null;
  #stderr = '';

  /** Starts workers/`file` with `program` (Node by default). */
  constructor(name, file, { program = process.execPath, env = {} } = {}) {
    this.name = name;
    this.#process = spawn(program, [path.join(workers, file)], {
      stdio: ['pipe', 'ignore', 'pipe', 'pipe'],
      env: { ...process.env, ...env },
    });
    this.#process.stderr.on('data', (chunk) => {
      this.#stderr = (this.#stderr + chunk).slice(-4000);
    });
    this.#process.on('error', (error) => this.#settle({ error: error.message }));
    this.#process.on('exit', (code, signal) => {
      this.#settle({ error: `process ended (${signal ?? code})\n${this.#stderr}` });
    });
    this.#process.stdin.on('error', () => {});
    readline.createInterface({ input: this.#process.stdio[3] }).on('line', (line) => this.#settle(JSON.parse(line)));
  }

  get pid() {
    return this.#process.pid;
  }

  #settle(reply) {
    const waiting = this.#waiting;
    this.#waiting = null;
    if (!waiting) return;
    if ('error' in reply) waiting.reject(new Error(`${this.name}: ${reply.error}`));
    else waiting.resolve(reply.result);
  }

  /** One request at a time. */
  ask(command, args = {}) {
    if (this.#process.exitCode !== null) {
      return Promise.reject(new Error(`${this.name}: process ended\n${this.#stderr}`));
    }
    return new Promise((resolve, reject) => {
      this.#waiting = { resolve, reject };
      this.#process.stdin.write(`${JSON.stringify({ command, args })}\n`);
    });
  }

  kill() {
    this.#process.kill('SIGKILL');
  }

  /** Lets the process end by itself, within five seconds. */
  async stop() {
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    const ended = new Promise((resolve) => this.#process.once('exit', resolve));
    this.#process.stdin.end();
    const timer = setTimeout(() => this.kill(), 5000);
    await ended;
    clearTimeout(timer);
  }
}
