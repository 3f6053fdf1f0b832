import { defineConfig } from 'vitest/config';

// Two at a time: most programs here are too small for the native pool to use every core.
export default defineConfig({
  test: {
    pool: 'forks',
    maxWorkers: 2,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    reporters: ['default', 'json'],
    outputFile: { json: 'build/test-results.json' },
    projects: [
      { extends: true, test: { name: 'cpu', include: ['test/**/*.test.ts'], exclude: ['test/package/**'] } },
      // What runs programs of small shapes, again on the emulated CUDA device.
      {
        extends: true,
        test: {
          name: 'simt',
          include: [
            'test/{ops,graph,elastic}/**/*.test.ts',
            'test/kernels/kernels.test.ts',
            'test/model/{decoder,seq2seq}.test.ts',
            'test/distill/{golden,blocks,pairs_golden}.test.ts',
            'test/infer/{generate,narrow,nested,trace}.test.ts',
          ],
          env: { ELASTIFORM_DEVICE: 'simt', ELASTIFORM_THREADS: '1' },
        },
      },
    ],
  },
});
