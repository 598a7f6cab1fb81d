"use strict";
// The calculator of calculator.md: the model of signax/cost.py, which counts all parameters as one
// array. Units are bits per second, bytes and seconds.

const METHODS = [
  ["f32 mean", "mean", 4],
  ["bf16 mean", "mean", 2],
  ["vote (signum, lion, sign_sgd)", "vote"],
  ["vote, agreement=True", "agreement"],
  ['vote, zeros="abstain"', "abstain"],
  ["mean of signs (ssdm)", "meanSigns"],
  ["mean of scaled signs (ef_sign_sgd)", "scaled", 1],
  ["mean_quantized, 2 bits", "scaled", 2],
  ["mean_quantized, 4 bits", "scaled", 4],
];
const MEAN = 1, VOTE = 2; // rows of METHODS that the recommendation compares
const BACKWARD = 2 / 3; // of a step's time
const WORTH_IT = 1.1; // times that a step must become shorter

const multiple = (count, unit) => Math.ceil(count / unit) * unit;
const sealed = (words) => multiple(words + 1, 128); // with a header

// Bytes that a worker sends, and the number of collectives.
function exchanged(scheme, width, parameters, workers) {
  const others = workers - 1;
  if (scheme === "mean") return [Math.ceil((2 * others * width * parameters) / workers), 1];
  if (scheme === "scaled") {
    const columns = multiple(2 * Math.ceil(parameters / 64), 2 * workers) / workers;
    return [8 * others * sealed(width * columns + 1), 2];
  }
  const even = parameters < 2 ** 14 ? multiple(parameters, 2) : parameters;
  const words = Math.ceil(even / 32);
  const up = { vote: 1, agreement: 2, abstain: 2, meanSigns: 1 }[scheme];
  const down = { abstain: 2, meanSigns: Math.floor(Math.log2(workers)) + 1 }[scheme] ?? 1;
  if (Math.floor((others * words * (up * others - down)) / workers) <= 2 ** 13)
    return [4 * others * sealed(up * words), 1];
  let part = Math.ceil(words / workers);
  if (part >= 2 ** 14) part = multiple(part, 128);
  return [4 * others * (sealed(up * part) + sealed(down * part)), 2];
}

function estimate(setting) {
  const { parameters, workers, link, stepTime, dtype, localSteps, buckets, latency, memory } = setting;
  return METHODS.map(([name, scheme, width]) => {
    const mean = scheme === "mean";
    const number = mean ? 1 : buckets;
    const size = Math.ceil(parameters / number);
    const [bytes, collectives] = exchanged(scheme, width, size, workers);
    const read = mean ? 0 : (size * (dtype === "f32" ? 4 : 2) * 8) / memory;
    const exchange = (8 * bytes) / link + collectives * latency + read; // of one bucket
    const backward = localSteps === 1 ? stepTime * BACKWARD : 0;
    const waiting = mean
      ? Math.max(0, exchange - backward)
      : Math.max(exchange, number * exchange - (backward * (number - 1)) / number);
    const step = stepTime + waiting / localSteps;
    return { name, bytes: (number * bytes) / localSteps, exchange: number * exchange, step };
  });
}

function recommend(costs, stepTime) {
  const [mean, vote] = [costs[MEAN].step, costs[VOTE].step];
  if (mean / vote < WORTH_IT)
    return `Average the gradients in bf16: a step takes ${seconds(mean)}, with a vote ` +
      `${seconds(vote)}. One bit does not pay here.`;
  const waiting = (vote - stepTime) / vote;
  return `Vote: a step takes ${seconds(vote)}, with a bf16 mean ${seconds(mean)}, ` +
    `${(mean / vote).toFixed(1)} times as long.` +
    (waiting > 0.5
      ? ` The exchange is still ${Math.round(100 * waiting)}% of a step: raise the buckets or the local ` +
        "steps, or send less often with accumulate=."
      : "");
}

// Writes a value in the largest unit that is not above it.
function format(value, units, digits = 3) {
  const [unit, factor] = units.findLast(([, factor]) => factor <= value) ?? units[0];
  return `${Number((value / factor).toPrecision(digits)).toLocaleString("en")} ${unit}`;
}
const seconds = (value) => format(value, [["us", 1e-6], ["ms", 1e-3], ["s", 1]]);
const sizes = [["B", 1], ["kB", 1e3], ["MB", 1e6], ["GB", 1e9], ["TB", 1e12]];
const rates = [["kbit", 1e3], ["Mbit", 1e6], ["Gbit", 1e9], ["Tbit", 1e12]];
const counts = [["", 1], ["k", 1e3], ["M", 1e6], ["B", 1e9], ["T", 1e12]];

// 1, 1.5, 2, 3, ... of each power of ten.
function decades(first, last) {
  const found = [];
  for (let power = first; power <= last; power++)
    for (const digit of [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]) found.push(Number(`${digit}e${power}`));
  return found;
}

// For each setting: the values of its slider, the first one shown, and how it is written.
const SETTINGS = {
  parameters: [decades(4, 12), 8e9, (n) => format(n, counts)],
  workers: [[2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024], 4, String],
  link: [decades(6, 12), 1e10, (rate) => `${format(rate, rates)}/s`],
  stepTime: [decades(-4, 2), 0.5, seconds],
  localSteps: [[1, 2, 4, 8, 16, 32, 64, 128, 256, 512], 1, String],
  buckets: [[1, 2, 3, 4, 6, 8, 12, 16, 24, 32], 1, String],
  latency: [decades(-6, -2), 5e-5, seconds],
  memory: [decades(10, 14), 8e12, (rate) => `${format(rate / 8, sizes)}/s`],
};

function start(form) {
  const inputs = Object.fromEntries(Object.keys(SETTINGS).map((key) => [key, form.elements[key]]));
  for (const [key, [values, first]] of Object.entries(SETTINGS)) {
    inputs[key].max = values.length - 1;
    inputs[key].value = values.indexOf(first);
  }
  const draw = () => {
    const setting = { dtype: form.elements.dtype.value };
    for (const [key, [values, , write]] of Object.entries(SETTINGS)) {
      setting[key] = values[inputs[key].valueAsNumber];
      inputs[key].closest("label").querySelector("output").value = write(setting[key]).trim();
    }
    show(setting);
  };
  form.addEventListener("input", draw);
  draw();
}

function show(setting) {
  const costs = estimate(setting);
  const longest = Math.max(...costs.map(({ step }) => step));
  const rows = costs.map(({ name, bytes, exchange, step }) => {
    const row = document.createElement("tr");
    Object.assign(row.dataset, { method: name, bytes, exchange, step });
    for (const text of [name, format(bytes, sizes, 4), seconds(exchange), seconds(step)])
      row.insertCell().textContent = text;
    const bar = row.insertCell().appendChild(document.createElement("span"));
    bar.className = "cost-bar";
    for (const [part, share] of [["computing", setting.stepTime], ["waiting", step - setting.stepTime]]) {
      const piece = bar.appendChild(document.createElement("span"));
      piece.className = `cost-${part}`;
      piece.style.width = `${(100 * share) / longest}%`;
    }
    return row;
  });
  document.querySelector("#cost-rows").replaceChildren(...rows);
  document.querySelector("#cost-advice").textContent = recommend(costs, setting.stepTime);
  const { parameters, workers, link, stepTime, dtype, localSteps, buckets, latency, memory } = setting;
  document.querySelector("#cost-command").textContent =
    `python -m signax.cost --parameters ${parameters} --workers ${workers} --link ${link / 1e9}gbit ` +
    `--step-time ${stepTime}s --dtype ${dtype} --local-steps ${localSteps} ` +
    `--buckets ${buckets} --latency ${latency}s --memory ${memory / 8e9}gbyte`;
}

document.addEventListener("DOMContentLoaded", () => start(document.querySelector("#cost")));
