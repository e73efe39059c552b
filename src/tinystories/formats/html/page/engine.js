// The forward pass: from a token and all before it to the logits of the next one.
//
// This is the CPU engine's int8 arithmetic, bit for bit (docs/cpu-engine.md of the project defines it), one token at a time.
// Shapes: C = n_embd, H heads of D = head_dim numbers, F = n_ff, V vocabulary. Two architectures: "classic" (LayerNorm,
// position embeddings, an MLP with ReLU or GELU) and "modern" (RMSNorm, RoPE, SwiGLU; as Llama and Qwen3).
import { fround, roundToInteger } from '../../../serve/page/float32.js';
import { exp, geluErf, geluTanh, relu, roundToHalf, silu, sum, sumOfSquares } from './numbers.js';
import { BLOCK_ROWS, makeKernels } from './kernels.js';

const ALIGNMENT = 64; // bytes
const SCORE_CHUNK = 16; // the sum of a softmax is taken over whole chunks of positions, counted from the start
const SMALLEST_MAXIMUM = fround(1e-30); // rows of smaller numbers are quantized to zeros
const ACTIVATIONS = { relu, gelu_tanh: geluTanh, gelu_erf: geluErf };

const roundUp = (n, multiple) => Math.ceil(n / multiple) * multiple;

// Where everything is in memory: the weights as they come, then the buffers one after the other.
function planMemory(config, weightBytes) {
  const { n_embd: C, n_head: H, kv_heads: K, head_dim: D, n_ff: F, n_ctx, n_layer, vocab_size: V } = config;
  const widest = Math.max(C, H * D, F);
  const sizes = {
    x: C, // the residual stream
    delta: roundUp(C, BLOCK_ROWS), // what a block adds to it
    input: widest, // of the next matmul
    quantized: roundUp(widest, 4) / 2, // the same as 16-bit integers
    q: roundUp(H * D, BLOCK_ROWS),
    k: roundUp(K * D, BLOCK_ROWS),
    v: roundUp(K * D, BLOCK_ROWS),
    attended: H * D,
    hidden: roundUp(F, BLOCK_ROWS),
    gate: roundUp(F, BLOCK_ROWS),
    scores: roundUp(n_ctx, SCORE_CHUNK),
    logits: roundUp(V, BLOCK_ROWS),
    keys: n_layer * K * n_ctx * D, // the KV cache: (layer, KV head, position, D)
    values: n_layer * K * n_ctx * D,
  };
  let end = roundUp(weightBytes, ALIGNMENT);
  const buffers = {};
  for (const [name, length] of Object.entries(sizes)) {
    buffers[name] = { start: end, length };
    end = roundUp(end + 4 * length, ALIGNMENT);
  }
  return { buffers, nBytes: end };
}

// Sinusoids of position * frequency. `fixes` has the few numbers that lie so close to the middle between two 32-bit numbers
// that another browser's sine might round them to the other one.
export function fillSinusoid(table, nPositions, frequencies, f, fixes) {
  const width = frequencies.length;
  for (let position = 0; position < nPositions; position++) {
    for (let i = 0; i < width; i++) table[position * width + i] = f(position * frequencies[i]);
  }
  for (const [index, value] of fixes) table[index] = value;
  return table;
}

export class Engine {
  // `header`: config, and where each tensor is in the weights. `plain`: without WebAssembly.
  constructor(header, { plain = false } = {}) {
    const { config, positions } = header;
    const { buffers, nBytes } = planMemory(config, header.weight_bytes);
    this.config = config;
    this.kernels = makeKernels(nBytes, plain);
    const { buffer } = this.kernels;
    this.bytes = new Int8Array(buffer);
    for (const [name, { start, length }] of Object.entries(buffers)) this[name] = new Float32Array(buffer, start, length);
    this.quantized = new Int16Array(buffer, buffers.quantized.start, 2 * buffers.quantized.length);
    this.nLoaded = 0; // bytes of the weights
    this.nRead = 0; // how many tokens the KV cache holds
    const tensor = (name) => header.tensors[name];
    const vector = (name) => tensor(name) && new Float32Array(buffer, tensor(name).start, tensor(name).n_bytes / 4);
    const matrix = (name, nIn) => {
      const values = tensor(`${name}.weight.int8`);
      const scales = vector(`${name}.weight.scales`);
      return values && { values: values.start, scales, nBlocks: scales.length / BLOCK_ROWS, nIn, bias: vector(`${name}.bias`) };
    };
    const { n_embd: C, n_head: H, head_dim: D, n_ff: F, n_ctx } = config;
    this.isModern = config.architecture === 'modern';
    this.layers = Array.from({ length: config.n_layer }, (_, i) => {
      const name = (part) => `layers.${i}.${part}`;
      const norm = (part) => ({ weight: vector(name(`${part}.weight`)), bias: vector(name(`${part}.bias`)) });
      return {
        window: config.windows[i] || n_ctx,
        inputNorm: norm('input_layernorm'),
        postNorm: norm('post_attention_layernorm'),
        qNorm: norm('self_attn.q_norm'),
        kNorm: norm('self_attn.k_norm'),
        q: matrix(name('self_attn.q_proj'), C),
        k: matrix(name('self_attn.k_proj'), C),
        v: matrix(name('self_attn.v_proj'), C),
        o: matrix(name('self_attn.o_proj'), H * D),
        gate: matrix(name('mlp.gate_proj'), C),
        up: matrix(name('mlp.up_proj'), C),
        down: matrix(name('mlp.down_proj'), F),
      };
    });
    this.norm = { weight: vector('norm.weight'), bias: vector('norm.bias') };
    this.head = matrix(config.tied ? 'embed_tokens' : 'lm_head', C);
    this.embeddingRows = tensor('embed_tokens.weight.rows')?.start;
    this.embeddingScales = vector('embed_tokens.weight.scales');
    this.positionTable = vector('embed_positions.weight');
    const table = (f, fixes) => fillSinusoid(new Float32Array(n_ctx * positions.frequencies.length), n_ctx, positions.frequencies, f, fixes);
    if (positions) {
      this.cos = table(Math.cos, positions.cos_fixes);
      this.sin = table(Math.sin, positions.sin_fixes);
    }
    this.attentionScale = config.scaled_scores ? fround(1 / Math.sqrt(D)) : 1;
    this.eps = fround(config.norm_eps);
  }

  // Write the next part of the weights, which is base64, into memory.
  addWeights(base64) {
    const binary = atob(base64);
    for (let i = 0; i < binary.length; i++) this.bytes[this.nLoaded + i] = binary.charCodeAt(i);
    this.nLoaded += binary.length;
  }

  // Read a token at position nRead; the logits (V) of the next one if they are wanted. The next call overwrites them.
  readToken(id, wantsLogits = true) {
    this.embed(id, this.nRead);
    this.layers.forEach((layer, i) => {
      this.attend(layer, i);
      this.applyMlp(layer);
    });
    this.nRead += 1;
    if (!wantsLogits) return null;
    this.normalize(this.x, this.config.n_embd, this.norm, this.input);
    this.multiply([[this.head, this.logits]], this.input);
    return this.logits.subarray(0, this.config.vocab_size);
  }

  embed(id, position) {
    const { n_embd: C } = this.config;
    const scale = this.embeddingScales[id];
    if (this.embeddingRows !== undefined) {
      for (let j = 0; j < C; j++) this.x[j] = this.bytes[this.embeddingRows + C * id + j] * scale;
    } else {
      // A row of the LM head: in blocks of 16 rows, pairs of columns of all 16 rows are next to each other.
      const start = this.head.values + Math.floor(id / BLOCK_ROWS) * BLOCK_ROWS * roundUp(C, 4) + 2 * (id % BLOCK_ROWS);
      for (let j = 0; j < C; j++) this.x[j] = this.bytes[start + (j >> 1) * 2 * BLOCK_ROWS + (j & 1)] * scale;
    }
    if (this.positionTable) {
      for (let j = 0; j < C; j++) this.x[j] += this.positionTable[C * position + j];
    } else if (!this.isModern) {
      for (let j = 0; j < C; j++) this.x[j] += (j % 2 ? this.cos : this.sin)[(C / 2) * position + (j >> 1)];
    }
  }

  // RMSNorm (modern) or LayerNorm of n numbers x to y, which may be x.
  normalize(x, n, { weight, bias }, y) {
    const mean = this.isModern ? 0 : fround(sum(x, n) / n);
    const variance = fround(fround(sumOfSquares(x, n, mean) / n) + this.eps);
    const scale = fround(1 / fround(Math.sqrt(variance)));
    if (this.isModern) {
      for (let i = 0; i < n; i++) y[i] = fround(fround(x[i] * scale) * weight[i]);
    } else {
      for (let i = 0; i < n; i++) y[i] = fround(fround(fround(fround(x[i] - mean) * scale) * weight[i]) + bias[i]);
    }
  }

  // Multiply the same input by several matrices: pairs of a matrix (out, in) and the array that takes its output.
  multiply(pairs, input) {
    const { nIn } = pairs[0][0];
    const scale = this.quantize(input, nIn);
    for (const [{ values, scales, nBlocks, bias }, output] of pairs) {
      this.kernels.matmul(values, scales.byteOffset, this.quantized.byteOffset, scale, output.byteOffset, nBlocks, Math.ceil(nIn / 4));
      if (bias) for (let i = 0; i < bias.length; i++) output[i] += bias[i];
    }
  }

  // Round n numbers to integers of up to 16 bits with one scale, which is returned. Their range is as large as it can be
  // without a sum of n products with 8-bit weights exceeding 32 bits.
  quantize(x, n) {
    const range = Math.min(32767, Math.floor((2 ** 31 - 1) / (127 * n)));
    let maximum = 0;
    for (let i = 0; i < n; i++) {
      const magnitude = Math.abs(x[i]);
      if (!(magnitude < Infinity)) return NaN; // and so become all outputs
      if (magnitude > maximum) maximum = magnitude;
    }
    const inverse = maximum > SMALLEST_MAXIMUM ? fround(range / maximum) : 0;
    for (let i = 0; i < n; i++) this.quantized[i] = roundToInteger(fround(x[i] * inverse));
    for (let i = n; i % 4; i++) this.quantized[i] = 0; // the kernel reads 4 at a time
    return fround(maximum / range);
  }

  // x += output of attention, for the token at position nRead.
  attend(layer, index) {
    const { n_embd: C, n_head: H, kv_heads: K, head_dim: D, n_ctx } = this.config;
    this.normalize(this.x, C, layer.inputNorm, this.input);
    this.multiply([[layer.q, this.q], [layer.k, this.k], [layer.v, this.v]], this.input);
    const headStart = (h) => (index * K + h) * n_ctx * D; // of KV head h in the cache
    for (let h = 0; h < K; h++) {
      this.rotate(this.k.subarray(h * D, (h + 1) * D), layer.kNorm);
      const cell = headStart(h) + this.nRead * D;
      for (let d = 0; d < D; d++) {
        this.keys[cell + d] = roundToHalf(this.k[h * D + d]);
        this.values[cell + d] = roundToHalf(this.v[h * D + d]);
      }
    }
    const first = Math.max(0, this.nRead + 1 - layer.window);
    for (let h = 0; h < H; h++) {
      this.rotate(this.q.subarray(h * D, (h + 1) * D), layer.qNorm);
      const cell = headStart(Math.floor((h * K) / H)) + first * D; // grouped-query attention: H / K heads share keys and values
      this.attendHead(this.q.byteOffset + 4 * h * D, cell, first, this.attended.subarray(h * D, (h + 1) * D));
    }
    this.multiply([[layer.o, this.delta]], this.attended);
    for (let i = 0; i < C; i++) this.x[i] += this.delta[i];
  }

  // output (D) = softmax(q . keys * scale) values, over the positions from `first` to nRead, which begin at `cell`.
  attendHead(query, cell, first, output) {
    const { scores, kernels, attentionScale } = this;
    const { head_dim: D } = this.config;
    const n = this.nRead + 1 - first;
    const lead = first % SCORE_CHUNK; // the scores begin at a whole chunk
    const end = lead + n;
    const scoresAddress = scores.byteOffset + 4 * lead;
    kernels.scores(query, this.keys.byteOffset + 4 * cell, scoresAddress, n, D);
    let maximum = -Infinity;
    for (let i = lead; i < end; i++) if (scores[i] > maximum) maximum = scores[i];
    for (let i = lead; i < end; i++) scores[i] = exp(fround(fround(scores[i] - maximum) * attentionScale));
    const padded = roundUp(end, SCORE_CHUNK);
    scores.fill(0, 0, lead);
    scores.fill(0, end, padded);
    const total = sum(scores, padded);
    kernels.mix(scoresAddress, this.values.byteOffset + 4 * cell, output.byteOffset, n, D);
    for (let d = 0; d < D; d++) output[d] /= total;
  }

  // QK-norm and RoPE of one head (D) in place, in modern models: dimension d is paired with d + D/2.
  rotate(head, norm) {
    if (!this.isModern) return;
    const { head_dim: D } = this.config;
    if (norm.weight) this.normalize(head, D, norm, head);
    const half = D / 2;
    for (let d = 0; d < half; d++) {
      const cos = this.cos[this.nRead * half + d];
      const sin = this.sin[this.nRead * half + d];
      const a = head[d];
      const b = head[half + d];
      head[d] = fround(a * cos) - fround(b * sin);
      head[half + d] = fround(b * cos) + fround(a * sin);
    }
  }

  // x += output of the MLP: down(silu(gate x) * up x), or down(activation(up x)).
  applyMlp(layer) {
    const { n_embd: C, n_ff: F, activation } = this.config;
    const { hidden, gate } = this;
    this.normalize(this.x, C, layer.postNorm, this.input);
    if (this.isModern) {
      this.multiply([[layer.up, hidden], [layer.gate, gate]], this.input);
      for (let i = 0; i < F; i++) hidden[i] = fround(hidden[i] * silu(gate[i]));
    } else {
      const apply = ACTIVATIONS[activation];
      this.multiply([[layer.up, hidden]], this.input);
      for (let i = 0; i < F; i++) hidden[i] = apply(hidden[i]);
    }
    this.multiply([[layer.down, this.delta]], hidden);
    for (let i = 0; i < C; i++) this.x[i] += this.delta[i];
  }
}
