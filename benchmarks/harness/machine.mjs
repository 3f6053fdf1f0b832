// What a benchmark result must say about the machine it was measured on.
import fs from 'node:fs';
import os from 'node:os';

export function machineFacts() {
  const cpus = os.cpus();
  const facts = {
    cpu: cpus[0].model.trim(),
    logicalCpus: cpus.length,
    availableParallelism: os.availableParallelism(),
    memoryGiB: Math.round(os.totalmem() / 2 ** 30),
    platform: `${os.platform()} ${os.release()} ${os.arch()}`,
    node: process.version,
  };
  if (process.platform === 'linux') {
    const info = fs.readFileSync('/proc/cpuinfo', 'utf8');
    const field = (name) => new RegExp(`^${name}\\s*:\\s*(.*)$`, 'm').exec(info)?.[1];
    facts.cpuFamilyModel = `${field('cpu family')}/${field('model')}`;
    const flags = new Set((field('flags') ?? '').split(' '));
    facts.instructionSets = ['avx2', 'fma', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_bf16'].filter((f) =>
      flags.has(f),
    );
    facts.hypervisor = flags.has('hypervisor');
  }
  return facts;
}
