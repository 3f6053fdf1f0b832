// What a loaded model owns: tensors, mapped files, an engine.

interface Disposable {
  dispose(): void;
}

/** Takes a part over, and gives it back. */
export type Own = <P extends Disposable>(part: P) => P;

/**
 * Loads something of which the parts are disposed of in reverse order: by `dispose`, or at once where loading fails.
 *
 * @param load passes every part that it makes to `own`
 */
export async function owning<T>(load: (own: Own, dispose: () => void) => Promise<T>): Promise<T> {
  const owned: Disposable[] = [];
  const dispose = (): void => {
    for (const part of owned.splice(0).reverse()) part.dispose();
  };
  try {
    return await load((part) => {
      owned.push(part);
      return part;
    }, dispose);
  } catch (error) {
    dispose();
    throw error;
  }
}
