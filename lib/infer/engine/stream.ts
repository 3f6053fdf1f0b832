// A generation that runs on its own and can be read as it comes, afterwards, or both.
import type { FinishReason, GenerateChunk, GenerateStream, Usage } from '../types.js';

interface Finished {
  reason: FinishReason;
  usage: Usage;
}

/** Starts `produce` at once. `stop` is called when a reader leaves early. */
export function startStream(
  produce: (emit: (chunk: GenerateChunk) => void) => Promise<Finished>,
  stop: () => void,
): GenerateStream {
  const chunks: GenerateChunk[] = [];
  let wake: (() => void)[] = [];
  const wakeAll = (): void => {
    const waiting = wake;
    wake = [];
    for (const resume of waiting) resume();
  };

  let settled = false;
  const done = produce((chunk) => {
    chunks.push(chunk);
    wakeAll();
  });
  const end = (): void => {
    settled = true;
    wakeAll();
  };
  done.then(end, end);

  // Whoever wants the error gets it from any promise or from the iterator; the others must not count as unhandled.
  const quiet = <T>(promise: Promise<T>): Promise<T> => {
    promise.catch(() => {});
    return promise;
  };

  return {
    text: quiet(done.then(() => chunks.map((c) => c.text).join(''))),
    ids: quiet(done.then(() => chunks.map((c) => c.token))),
    usage: quiet(done.then((f) => f.usage)),
    finishReason: quiet(done.then((f) => f.reason)),
    async *[Symbol.asyncIterator]() {
      let complete = false;
      try {
        for (let next = 0; ; ) {
          if (next < chunks.length) yield chunks[next++];
          else if (settled) break;
          else await new Promise<void>((resume) => wake.push(resume));
        }
        complete = true;
        await done;
      } finally {
        if (!complete) stop();
      }
    },
  };
}
