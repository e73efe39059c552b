// Run an exported page without a browser: node run.js story.html < requests.json. Prints the stories' ids and texts as JSON.
const { readFileSync } = require('node:fs');
const { runInThisContext } = require('node:vm');

const html = readFileSync(process.argv[2], 'latin1'); // the weights need no decoding; other parts are decoded below

// The contents of <script ...> elements whose tag contains `mark`.
function* scripts(mark) {
  for (let at = html.indexOf(mark); at >= 0; at = html.indexOf(mark, at)) {
    const start = html.indexOf('>', at) + 1;
    at = html.indexOf('</script>', start);
    yield html.slice(start, at);
  }
}

const text = (mark) => Buffer.from(scripts(mark).next().value, 'latin1').toString('utf8');
const { runStories } = runInThisContext(`${text('id="program"')}\n({ runStories })`);
const chunks = scripts('class="weights"');
const { requests, plain } = JSON.parse(readFileSync(0, 'utf8'));
process.stdout.write(JSON.stringify(runStories(JSON.parse(text('id="model"')), chunks, requests, { plain })));
