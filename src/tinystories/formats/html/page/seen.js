// The ids that the repetition penalty applies to: those of the last `window` tokens (0: of all), without spared ones.
export class SeenIds {
  constructor(vocabSize, window, isSpared) {
    this.flags = new Uint8Array(vocabSize);
    this.window = window;
    this.isSpared = isSpared;
    this.recent = [];
    this.counts = new Map(); // of the ids in `recent`
  }

  add(id) {
    if (!this.isSpared(id)) this.flags[id] = 1;
    if (!this.window) return;
    this.recent.push(id);
    this.counts.set(id, (this.counts.get(id) ?? 0) + 1);
    if (this.recent.length <= this.window) return;
    const oldest = this.recent.shift();
    this.counts.set(oldest, this.counts.get(oldest) - 1);
    if (!this.counts.get(oldest)) this.flags[oldest] = 0;
  }
}
