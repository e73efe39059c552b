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
