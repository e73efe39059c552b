// Cividis (Nunez, Anderton and Renslow 2018): a scale that color-blind readers see as others do.
const STOPS = ['00224e', '123570', '3b496c', '575d6d', '707173', '8a8678', 'a59c74', 'c3b369', 'e1cc55', 'fee838'].map((hex) =>
  [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)),
);

export function isDark() {
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  return scheme === 'dark' || (scheme !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches);
}

// The color [r, g, b] of a value from 0 to 1. 0 is close to the page, light or dark; 1 is far from it.
export function scale(value, dark = isDark()) {
  const v = Math.min(1, Math.max(0, value));
  const place = (dark ? v : 1 - v) * (STOPS.length - 1);
  const i = Math.min(STOPS.length - 2, Math.floor(place));
  const page = dark ? [31, 34, 40] : [255, 253, 248];
  const alpha = Math.min(1, 0.12 + 1.6 * v);
  return STOPS[i].map((low, c) => {
    const color = low + (STOPS[i + 1][c] - low) * (place - i);
    return Math.round(page[c] + (color - page[c]) * alpha);
  });
}

// Background and text. Of black and white, the text has the one with more contrast, which is at least 4.5 (WCAG 2).
export function shade(value, dark) {
  const [r, g, b] = scale(value, dark);
  const [red, green, blue] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const isLight = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179;
  return { background: `rgb(${r} ${g} ${b})`, color: isLight ? '#000000' : '#ffffff' };
}

// Draw bytes (0 to 255), rows of `size`, one pixel a cell.
export function drawBytes(canvas, cell, size, dark = isDark()) {
  canvas.width = canvas.height = size;
  const table = Array.from({ length: 256 }, (_, i) => scale(i / 255, dark));
  const image = new ImageData(size, size);
  for (let row = 0; row < size; row++) {
    for (let column = 0; column < size; column++) {
      image.data.set([...table[cell(row, column)], 255], 4 * (row * size + column));
    }
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
}
