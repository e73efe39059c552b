// "Copy as Python": the lines that make the numbers of a figure with the Python API.

// JSON is Python, but for true, false and null.
const literal = (value) => (value === true ? 'True' : value === false ? 'False' : value === null ? 'None' : JSON.stringify(value));
const keywords = (options) => Object.entries(options).map(([name, value]) => `${name}=${literal(value)}`).join(', ');

export function pythonLoad(model) {
  const { model: folder, ...options } = model.load_options;
  const isFolder = folder !== undefined;
  const path = isFolder ? [`${literal(folder)}`] : [];
  const comment = isFolder ? '  # the path of this model' : '';
  return `import tinystories\n\nstoryteller = tinystories.load(${[...path, keywords(options)].filter(Boolean).join(', ')})${comment}`;
}

// A text as it was written; ids where tokens were chosen one by one, or where its beginning was cut off.
export function pythonTrace(model, tokens, appended) {
  const what = appended.length || tokens.n_dropped ? `[${tokens.ids.join(', ')}]` : literal(tokens.text);
  return `${pythonLoad(model)}\ntrace = storyteller.trace(${what})`;
}

export const pythonWords = (trace) => `${trace}
for label, bits, rank in zip(trace.labels, trace.surprise_bits, trace.ranks):
    print(label, bits, rank)`;

export const pythonNext = (trace, sampling, n) => `${trace}
step = storyteller.next_token(trace, ${keywords(sampling)})
for candidate in step.candidates(${n}):
    print(candidate.text, candidate.model_prob, candidate.final_prob, candidate.cut_by)`;

export const pythonTree = (load, paths) => `${load}
for ids, n in ${JSON.stringify(paths)}:  # the tokens of a path, and how many of them were chosen
    print(2 ** -storyteller.trace(ids).surprise_bits[-n:])`;

export const pythonEndings = (load, text, options) => `${load}
stories = storyteller.generate(${literal(text)}, ${keywords(options)})
for story in stories:
    print(story.continuation)`;

export const pythonHead = (trace, layer, head) => `${trace}
attention = (trace.attention_bytes(${layer})[${head}] / 255) ** 2  # rows read columns
print(attention)`;

export const pythonHeads = (trace) => `${trace}
attention = trace.attention  # layer, head, token that reads, token that is read
n = len(trace.ids)
to_first = attention[:, :, 2:, 0].mean(axis=2)
to_itself = attention.diagonal(0, 2, 3)[:, :, 2:].mean(axis=2)
to_previous = attention.diagonal(-1, 2, 3)[:, :, 1:].mean(axis=2)
is_same = [[j < i and trace.ids[i] == trace.ids[j] for j in range(n)] for i in range(2, n)]
to_same = (attention[:, :, 2:] * is_same).sum(axis=3).mean(axis=2)
print(to_first, to_itself, to_previous, to_same)`;

export const pythonAblation = (trace, heads) => `${trace}
ablated = trace.ablate([${heads.map(([layer, head]) => `(${layer}, ${head})`).join(', ')}])
print(trace.mean_bits, ablated.mean_bits)`;

export const pythonLens = (trace, start, stop) => `${trace}
lens = trace.logit_lens(top=5, positions=range(${start}, ${stop}))
print(lens.top_ids, lens.top_probs, lens.final_ranks)`;

// ---- Runs. The page knows the names of runs, not where they are.

const runFolder = (name) => `runs/${name}`;

export const pythonCurves = (names) => `import json
from pathlib import Path

runs = {}
for folder in ${JSON.stringify(names.map(runFolder))}:  # the paths of the runs
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").split("\\n")[:-1]
    runs[folder] = [json.loads(line) for line in lines]
for folder, records in runs.items():
    for record in records:
        print(folder, record)`;

export const pythonSamples = (name, step) => `from pathlib import Path

text = Path(${literal(runFolder(name))}, "samples.md").read_text(encoding="utf-8")  # the path of the run
section = text.split("## Step ${step.toLocaleString('en')} (")[-1].split("\\n## Step ")[0]
stories = [[]]
for line in section.splitlines():
    if line.startswith(">"):
        stories[-1].append(line[1:].removeprefix(" "))
    elif stories[-1]:
        stories.append([])
stories = ["\\n".join(lines) for lines in stories if lines]
for story in stories:
    print(story)`;

// A text of which the first tokens do not fit into the context is traced from there on.
const traceCall = (text, nDropped, reader = 'storyteller') => `${reader}.trace(${literal(text)}${nDropped ? ', window=True' : ''})`;

// What each of these checkpoints makes of a text.
export const pythonCheckpoints = (name, steps, text, nDropped) => `import tinystories

folder = ${literal(`${runFolder(name)}/checkpoints`)}  # of the run
traces = {}
for step in ${JSON.stringify(steps)}:
    storyteller = tinystories.load(f"{folder}/step-{step:07}", engine="cpu", precision="fp32")
    traces[step] = trace = ${traceCall(text, nDropped)}
    print(step, trace.bits_per_byte, trace.surprise_bits)
    for candidate in storyteller.next_token(trace).candidates(5):
        print(candidate.text, candidate.model_prob)`;

// ---- Two sides

// The other model is that of --compare, or a checkpoint of a run: {compare, name} or {run, step}.
export function pythonOther({ compare, name, run, step }) {
  const folder = compare ? name : step === null ? runFolder(run) : `${runFolder(run)}/checkpoints/step-${String(step).padStart(7, '0')}`;
  return `other = tinystories.load(${literal(folder)}, engine="cpu", precision="fp32")  # the path of the other model`;
}

// `sides`: what each side read, {text, n_dropped}.
export const pythonTwoTexts = (model, sides) => `${pythonLoad(model)}
traces = [${sides.map((side) => traceCall(side.text, side.n_dropped)).join(', ')}]`;

export const pythonTwoModels = (model, other, sides) => `${pythonLoad(model)}
${pythonOther(other)}
traces = [${sides.map((side, i) => traceCall(side.text, side.n_dropped, i ? 'other' : 'storyteller')).join(', ')}]`;

export const pythonReadings = (traces) => `${traces}
for trace in traces:
    print(trace.bits_per_byte, trace.mean_bits)
    for label, bits in zip(trace.labels, trace.surprise_bits):
        print(label, bits)`;

export const pythonDuel = (traces, rows) => `${traces}
a, b = (storyteller.next_token(trace).model_probs for trace in traces)
for token, label in ${JSON.stringify(rows.map(({ id, label }) => [id, label]))}:
    print(label, a[token], b[token])
overlap = sum(min(p, q) for p, q in zip(a, b))
print(overlap)`;

export const pythonApart = (traces, n) => `${traces}
for trace in traces:
    for candidate in storyteller.next_token(trace).candidates(${n}):
        print(candidate.text, candidate.model_prob)`;

export const pythonPieces = (tokenizer, text) => `${tokenizer}
ids = tokenizer.encode(${literal(text)})
print(len(ids), [tokenizer.decode([token]) for token in ids])`;

export const pythonQuiz = (model, item, { answer, distractor }) => `import math

${pythonLoad(model)}


def log_prob(text):
    return sum(token.logprob for token in storyteller.score(text)[:-1])  # without the END behind it


probs = []  # after the story, and after the last sentence alone
for before in [${literal(item.context + item.before)}, ${literal(item.before)}]:
    log_odds = log_prob(before + ${literal(answer + item.after)}) - log_prob(before + ${literal(distractor + item.after)})
    probs.append(1 / (1 + math.exp(-log_odds)))
print(probs)`;
