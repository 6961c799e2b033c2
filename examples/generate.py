"""Answer a question about a long document, with the prompt at full depth and at two thirds of the layers.

python examples/generate.py MODEL_FOLDER
"""

import sys
from pydoc_data.topics import topics

import pop_ext

model = pop_ext.load(sys.argv[1], prefill_depth=2 / 3)
question = "How do I create a dictionary in Python?"
prompt = f"{question}\n\n{topics['typesmapping'].strip()[:2000]}\n\n{question}\n"

for name, depth in (("all layers", 1.0), ("two thirds of the layers", None)):
    output = model.generate(prompt, prefill_depth=depth, max_new_tokens=48, do_sample=False)
    print(f"{name}: first token after {output.times.time_to_first_token:.3f} s")
    print(output.text[0].strip(), end="\n\n")
