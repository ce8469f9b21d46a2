
// What it shows comes from GET /events (status and story), /plan/MODEL, /memory and /operations/ID.
// Everything reaches the page as text, never as HTML; the policy of the page sees to that, too.

const SILENT_MS = 45000; // the daemon says something every 15 s
const LINES = 40;
const MOVING = ["starting", "rousing", "roused", "waking", "draining", "falling-asleep", "stopping", "proving"];
const LOOKS = { awake: "●", asleep: "○", moving: "◐", failed: "✗", down: "·" };
const MARKS = { done: "✓", running: "▸", waiting: "·", failed: "✗" };
const OPEN = ["drain", "prove"]; // they take as long as an answer, or a trial, takes

const $ = (id) => document.getElementById(id);
let status = null; // the newest; null until there is one
let skew = 0; // the daemon's clock less ours, in seconds
let live = false;
let key = sessionStorage.getItem("homegpt-key") || "";

// ---------------------------------------------------------------- words

const now = () => Date.now() / 1000 + skew;
const gib = (mib) => (mib / 1024).toFixed(1);
const plural = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

function short(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m`;
  if (s < 86400) return `${Math.floor(s / 3600)}h${String(Math.floor((s % 3600) / 60)).padStart(2, "0")}`;
  return `${Math.floor(s / 86400)}d`;
}

function left(seconds) {
  const s = Math.floor(seconds);
  return s < 3600 ? `${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")}` : short(s);
}

function seconds(s) {
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 119.5) return `${s.toFixed(0)} s`;
  const whole = Math.round(s);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")} min`;
}

const spent = (s, expected) => (!expected || s > expected ? seconds(s) : `${seconds(s)} of about ${seconds(expected)}`);
const title = (operation) => [operation.kind, operation.model].filter(Boolean).join(" ");

function stateOf(model) {
  if (model.status === "error") return ["failed", "failed"];
  if (model.phase === "asleep") return [model.level ? `asleep L${model.level}` : "asleep", "asleep"];
  if (MOVING.includes(model.phase)) return [model.phase.replace("-", " "), "moving"];
  if (model.phase === "awake") return ["awake", "awake"];
  return [model.status === "disabled" ? "disabled" : "stopped", "down"];
}

// ---------------------------------------------------------------- the page's parts

function el(tag, names, ...inside) {
  const made = document.createElement(tag);
  if (names) made.className = names;
  made.append(...inside.filter((each) => each !== null && each !== ""));
  return made;
}

function say(node, text) { // what stays the same is not touched: nothing flickers, nothing is read twice
  if (node.textContent !== text) node.textContent = text;
}

function dress(node, names) {
  if (node.className !== names) node.className = names;
}

function fill(node, children, as) { // anew, but only where it would look different
  if (node.dataset.as === as) return;
  node.dataset.as = as;
  node.replaceChildren(...children());
}

function within(parent, made, keys, make) { // one child for each key, in their order
  for (const [each, child] of made) if (!keys.includes(each)) { child.remove(); made.delete(each); }
  keys.forEach((each, at) => {
    if (!made.has(each)) made.set(each, make(each));
    const child = made.get(each);
    if (parent.children[at] !== child) parent.insertBefore(child, parent.children[at] || null);
  });
}

// ---------------------------------------------------------------- the daemon

class Refused extends Error {
  constructor(code, text) { super(text); this.code = code; }
}

async function ask(path, more = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...more.headers };
  const answer = await fetch(path, { cache: "no-store", credentials: "omit", ...more, headers });
  if (answer.ok) return answer;
  let told = `the daemon answers ${answer.status}`;
  try { told = (await answer.json()).error.message; } catch { /* no JSON of ours */ }
  throw new Refused(answer.status, told);
}

const get = async (path) => (await ask(path)).json();

async function listen() {
  const stop = new AbortController();
  let alarm = 0;
  const heard = () => { clearTimeout(alarm); alarm = setTimeout(() => stop.abort(), SILENT_MS); };
  reconnect = () => stop.abort();
  heard();
  try {
    const reader = (await ask("/events", { signal: stop.signal })).body.getReader();
    const decoder = new TextDecoder();
    let rest = "", fresh = true;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      heard();
      const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const [, kind, data] = /^event: (\w+)\ndata: (.*)$/.exec(event) || [];
        if (fresh && kind) { $("lines").replaceChildren(); fresh = false; }
        if (kind === "story") tell(JSON.parse(data));
        if (kind === "status") show(JSON.parse(data));
      }
    }
  } finally {
    clearTimeout(alarm);
    stop.abort();
  }
}

let reconnect = () => {};

async function follow() {
  for (let pause = 1; ; pause = Math.min(pause * 2, 15)) {
    let why = "the daemon does not answer";
    try {
      await listen();
    } catch (error) {
      if (error instanceof Refused) why = error.message;
      if (error.code === 401) { lost(""); await askForKey(key ? why : ""); pause = 0.5; continue; }
    }
    if (live) pause = 1;
    for (let rest = pause; rest > 0; rest -= 1) {
      lost(`${why}; trying again in ${Math.ceil(rest)} s`);
      const early = new Promise((go) => { reconnect = go; });
      if (await Promise.race([early, new Promise((go) => setTimeout(go, Math.min(rest, 1) * 1000))])) break;
    }
  }
}

const speak = (text) => say($("spoken"), text); // the one live region

function lost(text) {
  if (live) speak("the daemon does not answer");
  live = false;
  document.body.classList.add("stale");
  dress($("link"), "lost");
  say($("link"), text && status ? `${text} · as of ${clock(status.now)}` : text);
  buttons();
}

function askForKey(why) {
  key = "";
  sessionStorage.removeItem("homegpt-key");
  $("box").hidden = $("foot").hidden = true;
  $("door").hidden = false;
  for (const each of ["summary", "about"]) say($(each), "");
  say($("denied"), why);
  $("key").focus();
  return new Promise((go) => {
    $("door").onsubmit = (event) => {
      event.preventDefault();
      key = $("key").value.trim();
      sessionStorage.setItem("homegpt-key", key);
      $("key").value = "";
      $("door").hidden = true;
      go();
    };
  });
}

$("forget").onclick = () => {
  sessionStorage.removeItem("homegpt-key");
  location.reload();
};

document.onvisibilitychange = () => { if (!document.hidden && !live) reconnect(true); };

// ---------------------------------------------------------------- at each status

function show(given) {
  if (status && status.version !== given.version) location.reload(); // this page is of another daemon
  [status, skew, live] = [given, given.now - Date.now() / 1000, true];
  document.body.classList.remove("stale");
  dress($("link"), "");
  say($("link"), "live");
  $("box").hidden = false;
  summary();
  places();
  within($("rows"), rows, status.models.flatMap((m) => [m.id, `${m.id}/`]), makeRow);
  operations();
  who();
  tick();
  buttons();
  const moved = JSON.stringify(status.models.map((m) => [m.id, m.phase, m.level, m.requests.running > 0, m.memory_mib]))
    + JSON.stringify(status.gpus.map((g) => [g.freed_by, g.foreign_mib]));
  if (moved !== seen) { seen = moved; lookAround(); }
}

let seen = "";

function summary() {
  const phase = status.phase_of_daemon, text = status.summary;
  const begins = text.startsWith(phase);
  fill($("summary"), () => [el("span", phase, begins ? phase : `${phase}: `), begins ? text.slice(phase.length) : text], `${phase} ${text}`);
  speak(text.slice(0, text.lastIndexOf(";") >>> 0)); // without the requests, which come and go
  const awake = status.models.filter((m) => m.phase === "awake").map((m) => m.id);
  const title = `${phase === "ready" ? awake.join(", ") || "all asleep" : phase} · homeGPT`;
  if (document.title !== title) document.title = title;
}

function who() {
  const you = status.you;
  $("foot").hidden = !you.key && you.manage;
  $("forget").hidden = !you.key;
  const may = you.manage ? "" : "; switching is for keys that may manage, or for the box itself";
  say($("who"), you.key ? `key ${you.key}${may}` : "this page may look, but not switch: that is for the box itself");
}

// ---------------------------------------------------------------- memory

const made = new Map();
let measured = {}; // what is really free, by place
const placeName = (gpu) => (gpu === null ? "RAM" : `GPU ${gpu}`);

function places() {
  const all = [...status.gpus.map((gpu) => [gpu.index, gpu]), [null, status.host]];
  within($("places"), made, all.map(([at]) => String(at)), makePlace);
  for (const [at, place] of all) showPlace(made.get(String(at)), at, place);
}

function makePlace() {
  const bar = el("div", "bar"), sum = el("p", "sum");
  const held = el("ul", "held"), name = el("h3");
  bar.setAttribute("role", "img");
  return Object.assign(el("div", "place", name, sum, bar, held), { name, sum, bar, held, parts: new Map() });
}

function showPlace(node, at, place) {
  const held = place.total_mib - place.free_mib, free = measured[String(at)];
  const phases = Object.fromEntries(status.models.map((m) => [m.id, m.phase]));
  const really = free === undefined || free === null ? "" : ` (measured: ${gib(free)})`;
  const lent = place.freed_by ? `; freed by ${place.freed_by}` : "";
  say(node.name, placeName(at));
  const words = `${gib(place.used_mib + (place.reserved_mib || 0) + place.foreign_mib)} of ${gib(place.total_mib)} GiB, `;
  fill(node.sum, () => [words, el("b", "", `${gib(place.free_mib)} free`), really, lent], [words, place.free_mib, really, lent].join());

  const whole = Math.max(place.total_mib, place.held.reduce((sum, each) => sum + each.mib, place.foreign_mib), 1);
  const parts = place.held.map((each, n) => ({ ...each, id: `${n} ${each.model} ${each.what}`, moving: isMoving(phases[each.model]) }));
  if (place.foreign_mib) parts.push({ id: "foreign", model: "others", who: place.foreign, what: "foreign", mib: place.foreign_mib });
  within(node.bar, node.parts, parts.map((each) => each.id), () => el("i"));
  for (const each of parts) {
    const part = node.parts.get(each.id);
    dress(part, `${each.what}-fill${each.moving ? " moving-fill" : ""}`);
    part.style.width = `${(100 * each.mib) / whole}%`;
  }
  const listed = at === null ? together(parts) : parts.map((each) => [each, word(each)]);
  const as = listed.map(([each, text]) => `${each.model} ${each.what} ${text}`).join("; ");
  fill(node.held, () => listed.map(([each, text]) => el("li", "", el("i", `${each.what}-fill`), el("b", "", each.model), ` ${text}`)), as);
  node.bar.setAttribute("aria-label", `${node.name.textContent}: ${node.sum.textContent}`);
}

const isMoving = (phase) => MOVING.includes(phase) && phase !== "draining";
const word = (part) => `${gib(part.mib)} ${part.what === "foreign" ? part.who && `(${part.who})` : part.what}`;

function together(parts) { // in RAM an engine has its processes and, mostly, what it pinned
  const own = parts.filter((each) => each.what !== "host");
  const rest = parts.filter((each) => each.what === "host" && !own.some((other) => other.model === each.model));
  return [...own, ...rest].map((each) => {
    const host = parts.find((other) => other.what === "host" && other.model === each.model);
    return [each, each.what === "host" ? `${gib(each.mib)} processes` : `${word(each)}${host ? ` + ${gib(host.mib)} processes` : ""}`];
  });
}

// ---------------------------------------------------------------- models and their plans

const rows = new Map();
const plans = new Map();
const refusals = new Map(); // of a switch that did not begin

function makeRow(id) {
  if (id.endsWith("/")) return makePlan(id.slice(0, -1));
  const cells = Object.fromEntries(["name", "state", "since", "held-now", "reqs", "why", "etas"].map((each) => [each, el("td", each)]));
  for (const cell of Object.values(cells)) cell.setAttribute("role", cell === cells.name ? "rowheader" : "cell");
  const more = el("button", "more", "…");
  more.setAttribute("aria-expanded", "false");
  more.setAttribute("aria-controls", `plan ${id}`.replace(/\s/g, "-"));
  more.onclick = () => toggle(id, more);
  cells.etas.append(more);
  const row = Object.assign(el("tr", "model", ...Object.values(cells)), { fields: cells, more });
  row.setAttribute("role", "row");
  return row;
}

function makePlan(id) {
  const head = el("p"), steps = el("ol"), sums = el("div", "sums"), note = el("p", "bad"), act = el("button", "act", "Switch");
  note.setAttribute("role", "alert");
  act.onclick = () => switchTo(id);
  const cell = el("td", "", el("div", "panel", head, act, steps, sums, note));
  cell.colSpan = 7;
  cell.setAttribute("role", "cell");
  const row = Object.assign(el("tr", "plan", cell), { panel: cell.firstChild, head, steps, sums, note, act, hidden: true });
  row.id = `plan ${id}`.replace(/\s/g, "-");
  row.setAttribute("role", "row");
  return row;
}

function toggle(id, more) {
  const plan = rows.get(`${id}/`);
  plan.hidden = !plan.hidden;
  more.setAttribute("aria-expanded", String(!plan.hidden));
  plan.panel.style.minHeight = "";
  refusals.delete(id);
  showPlan(id);
}

function showModel(model) {
  const { fields: cells, more } = rows.get(model.id);
  const [state, look] = stateOf(model);
  const people = model.name === model.id ? "" : model.name;
  const marks = [model.default && "default", model.pinned && "pinned"].filter(Boolean);
  fill(cells.name, () => [el("b", "", model.id), ...marks.flatMap((each) => [" ", el("span", "mark", each)]), el("small", "", people)],
    [model.id, people, marks].join());
  fill(cells.state, () => [Object.assign(el("span", "", LOOKS[look]), { ariaHidden: "true" }), ` ${state}`], state);
  dress(cells.state, `state ${look}`);
  say(cells.since, model.since === null ? "–" : short(now() - model.since));
  const { gpu, host } = model.memory_mib;
  fill(cells["held-now"], () => [gpu || host ? gib(gpu) : el("span", "", "–"), host ? el("span", "", ` + ${gib(host)} RAM`) : ""], `${gpu} ${host}`);
  const counts = Object.entries(model.requests).filter(([, n]) => n).map(([kind, n]) => `${n} ${kind}`);
  fill(cells.reqs, () => (counts.length ? counts.map((each) => el("div", "", each)) : [el("span", "none", "–")]), counts.join());
  const until = model.until !== null && model.until - now() >= 1 ? left(model.until - now()) : "";
  const why = model.error ? model.error.message : model.why, hint = model.error && model.error.hint;
  fill(cells.why, () => [until ? el("span", "left", `${until} `) : "", el("span", model.error ? "bad" : "", why), hint ? el("div", "hint", hint) : ""],
    [until, why, hint].join());
  const text = forecast(plans.get(model.id), model);
  say(more, text);
  more.setAttribute("aria-label", `a switch to ${model.id}: ${text}`);
}

function forecast(plan, model) {
  if (!plan) return "…";
  if (!plan.fits) return "no room";
  if (!plan.steps.length) return model.phase === "asleep" ? "…" : "at once"; // a moment ago it was awake
  return plan.eta ? seconds(plan.eta.mid_s) : "open";
}

function heading(plan) {
  if (!plan.fits) return `a switch to ${plan.model} is not possible now`;
  if (!plan.steps.length) return `${plan.model} is awake, nothing to do`;
  const eta = plan.eta && plan.eta.mid_s ? `, about ${seconds(plan.eta.mid_s)} (${seconds(plan.eta.low_s)} to ${seconds(plan.eta.high_s)})` : "";
  return `a switch to ${plan.model} takes ${plural(plan.steps.length, "step")}${eta}`;
}

function showPlan(id) {
  const row = rows.get(`${id}/`), plan = plans.get(id);
  if (!row || row.hidden || !plan) return;
  const steps = () => plan.steps.map((step, n) => el("li", "",
    el("span", "", `${n + 1}. ${step.do} ${step.model}`), el("span", "", step.expected_s === null ? "" : seconds(step.expected_s)), el("span", "", step.why)));
  say(row.head, heading(plan));
  fill(row.steps, steps, JSON.stringify(plan.steps));
  fill(row.sums, () => plan.sum.map((line) => el("p", "", line.replaceAll(" - ", " − "))), plan.sum.join("\n"));
  dress(row.panel, plan.fits ? "panel" : "panel refused");
  say(row.note, refusals.get(id) || "");
  button(id);
  row.panel.style.minHeight = `${row.panel.offsetHeight}px`; // open, it does not shrink
}

function button(id) {
  const { act } = rows.get(`${id}/`), plan = plans.get(id);
  const running = status.operations.some((each) => each.kind === "switch" && each.model === id);
  const awake = status.models.some((each) => each.id === id && each.phase === "awake");
  act.hidden = !status.you.manage || !plan || !plan.fits || awake || (!plan.steps.length && !running);
  act.disabled = !live || running;
  say(act, running ? "Switching …" : "Switch");
  act.setAttribute("aria-label", `Switch to ${id}`);
}

function buttons() {
  if (status) for (const model of status.models) if (rows.has(model.id)) button(model.id);
}

async function switchTo(id) {
  refusals.delete(id);
  const body = JSON.stringify({ model_id: id }), headers = { "Content-Type": "application/json" };
  try {
    const begun = await (await ask("/switch?wait=false", { method: "POST", headers, body })).json();
    if (!status.operations.some((each) => each.id === begun.id)) status.operations.push(begun);
    operations();
  } catch (error) {
    refusals.set(id, error instanceof Refused ? error.message : "the daemon does not answer");
  }
  showPlan(id);
}

let around = 0, looking = false;

function lookAround() { // plans and what is measured, once it is quiet for a moment; one question at a time
  clearTimeout(around);
  around = setTimeout(async () => {
    if (looking) return lookAround();
    looking = true;
    try {
      for (const { id } of status.models) {
        plans.set(id, await get(`/plan/${encodeURIComponent(id)}`));
        showPlan(id);
      }
      const report = await get("/memory");
      measured = Object.fromEntries(report.places.map((place) => [String(place.gpu), place.free_mib]));
      say($("pressure"), report.pressure >= 0.5 ? `${report.pressure.toFixed(0)} % of the last 10 s some task waited for host memory` : "");
      places();
      tick();
    } catch { /* the stream will say what is wrong */ } finally { looking = false; }
  }, 400);
}

setInterval(() => { if (live && !document.hidden) lookAround(); }, 15000);

// ---------------------------------------------------------------- operations

const shown = new Map(); // by id: what is on the page
const views = new Map(); // by id: the newest view of each

function operations() {
  for (const each of status.operations) views.set(each.id, each);
  const running = status.operations.map((each) => each.id);
  for (const [id, view] of views) {
    if (view.state === "running" && !running.includes(id)) end(id);
  }
  const ended = [...views.keys()].filter((id) => !running.includes(id));
  const ids = running.length ? running : ended.slice(-1); // the last stays until the next begins
  for (const id of ended) if (!ids.includes(id)) views.delete(id);
  within($("now"), shown, ids.length ? ids : [0], makeOperation);
  for (const id of ids) showOperation(id);
}

async function end(id) { // it has left the status: how it ended is asked for once
  const view = views.get(id);
  view.state = "ending";
  try { Object.assign(view, await get(`/operations/${id}`)); } catch { views.delete(id); }
  operations();
}

function makeOperation(id) {
  if (!id) return el("p", "idle", "No operation is under way.");
  const head = el("p"), gone = el("p", "gone"), steps = el("p", "steps"), last = el("p", "end"), fillUp = el("i");
  const node = el("div", "operation", head, gone, steps, last, el("div", "meter", fillUp));
  return Object.assign(node, { head, gone, steps, last, fillUp });
}

function showOperation(id) {
  const node = shown.get(id), view = views.get(id);
  const running = view.state === "running" || view.state === "ending", ago = running ? Math.max(0, now() - view.since) : view.elapsed_s;
  const expected = whole(view);
  dress(node, `operation ${running ? "" : view.state}`);
  fill(node.head, () => [el("b", "", title(view)), el("span", "by", ` asked by ${view.by}`)], title(view) + view.by);
  say(node.gone, running ? spent(ago, expected) : `${view.state} after ${seconds(view.elapsed_s)}`);
  const steps = view.steps.map((step) => [step.state, `${MARKS[step.state]} ${step.do} ${step.model} ${stepTime(step)}`]);
  fill(node.steps, () => steps.map(([state, text]) => el("span", state, text)), JSON.stringify(steps));
  node.steps.hidden = !view.steps.length && !running;
  const error = view.error;
  fill(node.last, () => (error ? [el("span", "bad", error.message), error.hint ? el("span", "hint", ` (${error.hint})`) : ""] : [el("span", "hint", waits(view) || view.outcome || "")]),
    error ? `${error.message} ${error.hint}` : waits(view) || view.outcome || "");
  const part = running ? (expected ? Math.min(ago / expected, 0.99) : 0) : 1;
  node.fillUp.style.width = `${100 * part}%`;
}

function whole(view) { // how long it should take, or null: what is over took as long as it took
  const each = view.steps.map((step) => (step.state === "done" ? step.seconds : OPEN.includes(step.do) ? null : step.expected_s));
  return each.length && !each.includes(null) ? each.reduce((sum, s) => sum + s) : null;
}

function stepTime(step) {
  if (step.state === "waiting") return step.expected_s === null ? "" : `about ${seconds(step.expected_s)}`;
  if (step.state === "running") return spent(step.seconds + Math.max(0, now() - status.now), step.expected_s);
  return step.seconds === null ? "" : seconds(step.seconds);
}

function waits(view) { // why it does not get on
  if (view.state !== "running") return "";
  const step = view.steps.find((each) => each.state === "running");
  const [own, busy] = [
    status.models.find((each) => each.id === (step || view).model),
    status.models.find((each) => MOVING.includes(each.phase)),
  ];
  if (step) return own && OPEN.includes(step.do) ? own.why : "";
  const other = own && MOVING.includes(own.phase) ? own : busy;
  if (other) return `waiting for ${other.id}: ${other.why}`;
  const before = status.operations.find((each) => each.id < view.id);
  return before ? `waiting for operation ${before.id}: ${title(before)}` : "waiting";
}

// ---------------------------------------------------------------- the story

const clock = (at) => new Date(at * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

function tell(line) {
  const time = el("time", "", clock(line.time));
  time.dateTime = new Date(line.time * 1000).toISOString();
  const row = el("li", line.level, time, el("span", "", line.message));
  $("lines").prepend(row);
  while ($("lines").children.length > LINES) $("lines").lastChild.remove();
}

// ---------------------------------------------------------------- the clock

function tick() {
  if (!status) return;
  for (const model of status.models) if (rows.has(model.id)) showModel(model);
  for (const id of views.keys()) if (shown.has(id)) showOperation(id);
  say($("about"), `${status.version} · up ${short(now() - status.started_at)}`);
}

setInterval(() => { if (live && !document.hidden) tick(); }, 250);
follow();
