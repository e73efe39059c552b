// A chart of lines, by uPlot, which is loaded with the first one.
import { html, useEffect, useRef, useState } from './ui.js';

let library = null;
let loading = null;

// uPlot is a script that sets a global name, as it is published.
function loadLibrary() {
  loading ??= new Promise((resolve) => {
    const script = document.createElement('script');
    script.src = '/page/vendor/uplot.js';
    script.onload = () => { library = window.uPlot; resolve(); };
    script.onerror = () => { loading = null; script.remove(); }; // the next chart tries again
    document.head.append(script);
  });
  return loading;
}

export const shorten = (number) => (number === null || number === undefined ? '–' : String(Number(number.toPrecision(4))));

export function axisText(value) {
  if (value === null) return '';
  const size = Math.abs(value);
  if (size >= 1e9) return `${shorten(value / 1e9)}G`;
  if (size >= 1e6) return `${shorten(value / 1e6)}M`;
  if (size >= 1e4) return `${shorten(value / 1e3)}k`;
  return size && size < 1e-3 ? value.toExponential(1).replace('.0', '') : shorten(value);
}

// `lines`: [{points: [[x, y]], color, dash, width, dots}]. `onPoint(x)` follows the mouse, `at` places the cursor.
export function Chart({ lines, xLabel, yLabel, label, height, dark, at, onPoint }) {
  const box = useRef(null);
  const plot = useRef(null);
  const handler = useRef(null);
  const place = useRef(null); // puts the cursor where it belongs, also after a drawing
  const [isReady, setReady] = useState(library !== null);
  handler.current = onPoint;
  useEffect(() => {
    if (!library) loadLibrary().then(() => setReady(true));
  }, []);

  const look = JSON.stringify(lines.map(({ points, ...rest }) => rest));
  const join = () => library.join(lines.map(({ points }) => [points.map(([x]) => x), points.map(([, y]) => y)]));
  useEffect(() => {
    if (!isReady) return undefined;
    const [ink, line] = dark ? ['#aaa398', '#3a3e46'] : ['#665d53', '#ddd2bf'];
    const axis = (text) => ({
      label: text || null, labelSize: 18, labelGap: 0, space: 30, labelFont: '13px sans-serif', font: '12px sans-serif', stroke: ink, grid: { stroke: line, width: 1 },
      ticks: { stroke: line, width: 1 }, values: (_, splits) => splits.map(axisText),
    });
    plot.current = new library({
      width: box.current.clientWidth, height, legend: { show: false }, scales: { x: { time: false } },
      cursor: { y: false, drag: { setScale: false, x: false, y: false }, points: { size: 7 } },
      axes: [{ ...axis(xLabel), size: 32, space: 60 }, { ...axis(yLabel), size: 58, space: height < 200 ? 20 : 30 }],
      series: [{}, ...lines.map(({ color, dash, width, dots }) => ({
        stroke: color, dash, width, points: { show: dots, size: 6, fill: color },
      }))],
      hooks: { draw: [() => place.current()], setCursor: [(u) => u.cursor.left >= 0 && u.cursor.event && handler.current?.(u.posToVal(u.cursor.left, 'x'))] },
    }, join(), box.current);
    const observer = new ResizeObserver(() => box.current && plot.current?.setSize({ width: box.current.clientWidth, height }));
    observer.observe(box.current);
    return () => {
      observer.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, [isReady, look, xLabel, yLabel, height, dark]);

  useEffect(() => {
    plot.current?.setData(join());
  }, lines.map(({ points }) => points).concat([isReady]));

  place.current = () => {
    if (!plot.current || at === null || at === undefined) return;
    plot.current.cursor.event = null; // this is not the mouse
    plot.current.setCursor({ left: plot.current.valToPos(at, 'x'), top: 0 });
  };
  useEffect(() => place.current(), [at]);
  return html`<div class="plot" role="img" aria-label=${label} ref=${box} data-points=${lines.map(({ points }) => points.length).join()}
    style=${{ minHeight: `${height}px` }}></div>`;
}
