import { defineConfig } from 'vitest/config';

// Tests of the package as npm installs it: npm run test:package. They need prebuilds/ (npm run build:prebuilds), dist/,
// a registry for the dependencies, and minutes for one build from source.
export default defineConfig({
  test: {
    name: 'package',
    include: ['test/package/*.test.ts'],
    globalSetup: 'test/package/setup.ts',
    pool: 'forks',
    maxWorkers: 1,
    testTimeout: 900_000,
    hookTimeout: 120_000,
    reporters: ['default', 'json'],
    outputFile: { json: 'build/package-test-results.json' },
  },
});
