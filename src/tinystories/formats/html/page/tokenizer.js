// Text to token ids and back: byte-pair encoding (BPE, arXiv 1508.07909) as in GPT-2, on bytes, or as in SentencePiece, on
// characters, with bytes for those that are not in the vocabulary. The ids are those of Hugging Face's tokenizers.

// GPT-2 writes the 256 bytes as printable characters: those that are printable as they are, others from U+0100 on.
function byteCharacters() {
  const characters = Array(256);
  let next = 256;
  for (let byte = 0; byte < 256; byte++) {
    const isPrintable = (byte > 32 && byte < 127) || (byte > 160 && byte < 256 && byte !== 173);
    characters[byte] = String.fromCharCode(isPrintable ? byte : next++);
  }
  return characters;
}

// Words with the space before them, numbers, other signs, white space. \s as the original's library has it.
const SPACE = '\\t-\\r\\x85\\p{Z}';
const WORD = new RegExp(`'(?:s|t|re|ve|m|ll|d)| ?\\p{L}+| ?\\p{N}+| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]+`, 'gu');
const SENTENCEPIECE_SPACE = '\u2581';
const byteName = (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`;

export class Tokenizer {
  // `data`: kind ("bytes" or "characters"), tokens by id (null: unused), merges in order of rank, and more. Merges come in runs
  // whose tokens have consecutive ids: the id of the first token, then the length of each token's left part.
  constructor(data) {
    this.data = data;
    this.isBytes = data.kind === 'bytes';
    this.ids = new Map(data.tokens.map((token, id) => [token, id]).filter(([token]) => token !== null));
    this.ranks = new Map(); // "left right" (ids) to [rank, merged id]
    let rank = 0;
    for (const [first, ...lengths] of data.merges) {
      lengths.forEach((length, i) => {
        const token = data.tokens[first + i];
        const pair = `${this.ids.get(token.slice(0, length))} ${this.ids.get(token.slice(length))}`;
        this.ranks.set(pair, [rank++, first + i]);
      });
    }
    this.special = new Set(data.special_ids);
    this.characters = byteCharacters();
    this.bytes = new Map(this.characters.map((character, byte) => [character, byte]));
    this.encoder = new TextEncoder();
    this.words = new Map(); // a word to its ids, since words come again
  }

  get endId() {
    return this.data.end_id;
  }

  // END, another special token, or an id outside the vocabulary: a story ends there.
  isStop(id) {
    return id >= this.data.tokens.length || this.special.has(id);
  }

  encode(text) {
    const wellFormed = new TextDecoder('utf-8', { ignoreBOM: true }).decode(this.encoder.encode(text)); // no lone surrogates
    if (!this.isBytes) return this.mergeAll(this.splitCharacters(wellFormed));
    return (wellFormed.match(WORD) ?? []).flatMap((word) => {
      if (!this.words.has(word)) this.words.set(word, this.encodeWord(word));
      return this.words.get(word);
    });
  }

  encodeWord(word) {
    const written = Array.from(this.encoder.encode(word), (byte) => this.characters[byte]);
    if (this.data.ignore_merges && this.ids.has(written.join(''))) return [this.ids.get(written.join(''))];
    return this.mergeAll(written.map((character) => this.ids.get(character)));
  }

  // A text as ids of its characters; a character without one as its bytes, or as the unknown token.
  splitCharacters(text) {
    const { prefix_space: hasPrefix, unknown_id: unknown } = this.data;
    const spaced = (hasPrefix && text ? ' ' + text : text).replaceAll(' ', SENTENCEPIECE_SPACE);
    const ids = [];
    let wasUnknown = false; // neighbors that are unknown become one token
    for (const character of spaced) {
      const id = this.ids.get(character);
      const fallback = id === undefined ? Array.from(this.encoder.encode(character), (byte) => this.ids.get(byteName(byte))) : [id];
      const isUnknown = fallback.includes(undefined);
      if (!isUnknown) ids.push(...fallback);
      else if (unknown !== null && !(wasUnknown && this.data.fuse_unknown)) ids.push(unknown);
      wasUnknown = isUnknown;
    }
    return ids;
  }

  // Merge the pair of the lowest rank, the leftmost if there are several, until no pair can be merged.
  mergeAll(ids) {
    for (;;) {
      let best = null;
      for (let i = 0; i + 1 < ids.length; i++) {
        const merge = this.ranks.get(`${ids[i]} ${ids[i + 1]}`);
        if (merge && (!best || merge[0] < best.rank)) best = { rank: merge[0], id: merge[1], at: i };
      }
      if (!best) return ids;
      ids.splice(best.at, 2, best.id);
    }
  }

  // The bytes that a token adds to a text; none for special tokens.
  tokenBytes(id) {
    const token = this.data.tokens[id] ?? null;
    if (token === null || this.special.has(id)) return new Uint8Array();
    if (this.isBytes) return Uint8Array.from([...token].filter((c) => this.bytes.has(c)), (c) => this.bytes.get(c));
    if (/^<0x[0-9A-Fa-f]{2}>$/.test(token)) return Uint8Array.of(parseInt(token.slice(3, 5), 16));
    return this.encoder.encode(token.replaceAll(SENTENCEPIECE_SPACE, ' '));
  }

  // A label for people: "·dog" begins with a space, "↵" is a line break, "\xf0" part of a character.
  label(id) {
    if (id === this.endId) return 'END';
    if (this.isStop(id)) return this.data.tokens[id] ?? `<${id}>`;
    const bytes = this.tokenBytes(id);
    const text = new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes);
    if (text.includes('\ufffd')) return Array.from(bytes, (byte) => (byte < 128 ? String.fromCharCode(byte) : `\\x${byte.toString(16)}`)).join('');
    return text.replaceAll(' ', '·').replaceAll('\n', '↵').replaceAll('\t', '⇥');
  }
}

// Text of ids as they come: whole characters only. Bytes that are not UTF-8 become U+FFFD.
export class Detokenizer {
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  }

  add(id) {
    return this.decoder.decode(this.tokenizer.tokenBytes(id), { stream: true });
  }

  finish() {
    return this.decoder.decode();
  }
}
