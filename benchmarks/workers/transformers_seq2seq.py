"""generate of transformers on an encoder-decoder model, in PyTorch: texts for sources of token ids, on request.

Requests are JSON lines on stdin, replies JSON lines on file descriptor 3.
"""
import json
import os
import sys
import time


class Commands:
    def load(self, dir, threads):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = transformers.AutoModelForSeq2SeqLM.from_pretrained(dir, dtype=torch.float32).eval()
        return {"version": f"transformers {transformers.__version__}, torch {torch.__version__}", "threads": torch.get_num_threads()}

    def write(self, sources, maxTokens, beams):
        with self.torch.inference_mode():
            ids = self.torch.tensor(sources)
            mask = self.torch.ones_like(ids)
            return self.model.generate(ids, attention_mask=mask, max_new_tokens=maxTokens, num_beams=beams, do_sample=False)[:, 1:].tolist()

    def texts(self, sources, maxTokens, beams):
        return self.write(sources, maxTokens, beams)

    def generate(self, sources, maxTokens, beams, batchMs):
        start, calls = time.perf_counter(), 0
        while True:
            self.write(sources, maxTokens, beams)
            calls += 1
            elapsed = (time.perf_counter() - start) * 1e3
            if elapsed >= batchMs:
                return {"ms": elapsed / calls, "calls": calls}


commands = Commands()
replies = os.fdopen(3, "w")
for line in sys.stdin:
    request = json.loads(line)
    try:
        reply = {"result": getattr(commands, request["command"])(**request["args"])}
    except Exception as error:  # the coordinator reports it
        reply = {"error": f"{type(error).__name__}: {error}"}
    replies.write(json.dumps(reply) + "\n")
    replies.flush()
