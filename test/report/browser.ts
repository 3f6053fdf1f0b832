// A headless Chromium for tests: the one CHROME_PATH names, else the one that comes with the development dependencies.
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Browser, chromium } from 'playwright-core';

/** The packaged binary is for this platform only. */
export const hasBrowser =
  process.env.CHROME_PATH !== undefined || (process.platform === 'linux' && process.arch === 'x64');

export async function launchBrowser(): Promise<{ browser: Browser; close(): Promise<void> }> {
  const args = ['--no-sandbox'];
  if (process.env.CHROME_PATH !== undefined) {
    const browser = await chromium.launch({ executablePath: process.env.CHROME_PATH, args });
    return { browser, close: () => browser.close() };
  }
  // The package unpacks into the temporary directory, with fonts and shared libraries only where it thinks that the
  // system has none: this runtime is one.
  const directory = mkdtempSync(join(tmpdir(), 'elastiform-chromium-'));
  const before = { ...process.env };
  Object.assign(process.env, { TMPDIR: directory, AWS_LAMBDA_JS_RUNTIME: 'nodejs20.x' });
  const remove = () => rmSync(directory, { recursive: true, force: true });
  try {
    const { default: packaged } = await import('@sparticuz/chromium');
    packaged.setGraphicsMode = false;
    const executablePath = await packaged.executablePath();
    const fonts = `<fontconfig><dir>${directory}/fonts</dir><cachedir>${directory}/cache</cachedir></fontconfig>`;
    writeFileSync(join(directory, 'fonts', 'fonts.conf'), fonts);
    const browser = await chromium.launch({ executablePath, args });
    const close = async () => {
      await browser.close();
      remove();
    };
    return { browser, close };
  } catch (error) {
    remove();
    throw error;
  } finally {
    for (const key of Object.keys(process.env)) if (!(key in before)) delete process.env[key];
    Object.assign(process.env, before);
  }
}
