// The live page: asks for the server's state once a second and shows it.
//
// Much of what is shown was chosen by clients: it reaches the page as text only, never as markup.

const POLL_MS = 1000;
const GIVE_UP_MS = 4000;
const SPAN_S = 300; // of the plots
const RATE_OVER = 5; // samples, in the figure of decisions a second
const SILENT_S = 5; // a robot that is quiet for longer is marked
const LINGER_MS = 10_000; // how long a robot's card waits for its next episode
const FRAMES_PER_S = 5;

const byId = (id) => document.getElementById(id);

async function get(path) {
  const reply = await fetch(path, { signal: AbortSignal.timeout(GIVE_UP_MS) });
  if (!reply.ok) throw new Error(`${path}: ${reply.status}`);
  return reply.json();
}

function element(tag, className = "", text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function say(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

// Words for numbers.

function duration(seconds) {
  const whole = Math.round(seconds);
  const twoDigits = (number) => String(Math.floor(number)).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}:${twoDigits(whole % 60)} min`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}:${twoDigits((whole / 60) % 60)} h`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole / 3600) % 24} h`;
}

function clock(unixS) {
  const then = new Date(1000 * unixS);
  const today = then.toDateString() === new Date().toDateString();
  return today ? then.toLocaleTimeString("en-GB") : then.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

const oneDigit = (number) => number.toFixed(1);

// The connection.

let heardMs = Date.now();

async function tick() {
  try {
    if (!document.hidden) show(await get("state"));
  } catch (error) {
    console.warn(error);
    showLost();
  }
  setTimeout(tick, POLL_MS);
}

function show(state) {
  heardMs = Date.now();
  showConnection(state.trouble);
  showFigures(state);
  showRobots(state.robots);
  showSessions(state.sessions);
  showPlots(state.samples);
  showSwaps(state.swaps);
  showEpisodes(state);
}

function showConnection(trouble) {
  document.body.classList.remove("lost-sight");
  byId("connection").className = trouble ? "" : "serving";
  say(byId("connection-state"), trouble ? `Not serving: ${trouble}` : "Serving");
  say(byId("connection-since"), "");
}

function showLost() {
  document.body.classList.add("lost-sight");
  byId("connection").className = "lost";
  say(byId("connection-state"), "Connection lost");
  say(byId("connection-since"), `${duration((Date.now() - heardMs) / 1000)} ago; trying again`);
}

function showFigures(state) {
  const rates = state.samples.slice(-RATE_OVER).map(([, , , rate]) => rate);
  say(byId("model"), state.model);
  say(byId("live"), state.live_version);
  say(byId("robot-count"), state.robots.length);
  say(byId("rate"), oneDigit(rates.reduce((sum, rate) => sum + rate, 0) / Math.max(1, rates.length)));
  say(byId("queue"), state.queue_depth);
  say(byId("uptime"), duration(state.uptime_s));
}

// Robots: a card each.  One that starts its next episode goes on in its card.

const cards = [];

function showRobots(robots) {
  const fresh = robots.filter((robot) => !cards.some((card) => card.robot.episode === robot.episode));
  for (const card of [...cards]) {
    const robot = robots.find((one) => one.episode === card.robot.episode) ?? takeNext(fresh, card.robot);
    if (robot) fillCard(card, robot);
    else retireCard(card);
  }
  for (const robot of fresh) cards.push(fillCard(newCard(), robot));
  byId("no-robots").hidden = cards.length > 0;
}

function takeNext(fresh, before) {
  const index = fresh.findIndex((robot) => robot.arm === before.arm && robot.client === before.client);
  return index < 0 ? null : fresh.splice(index, 1)[0];
}

function newCard() {
  const card = { node: element("li", "robot"), parts: {} };
  const part = (name, tag = "span") => (card.parts[name] = element(tag, name));
  const row = (className, ...nodes) => {
    const node = element("div", className);
    node.append(...nodes);
    return node;
  };
  const image = part("frame", "img");
  image.onerror = () => image.removeAttribute("src");
  card.node.append(
    image,
    row(
      "text",
      row("name", part("arm"), part("version")),
      part("instruction", "p"),
      row("figures", part("rate"), part("age")),
      part("place", "p"),
    ),
  );
  card.parts.place.classList.add("quiet");
  byId("robot-list").append(card.node);
  return card;
}

function fillCard(card, robot) {
  const { parts } = card;
  card.robot = robot;
  card.seenMs = Date.now();
  card.node.classList.remove("gone");
  say(parts.arm, robot.arm || "arm");
  say(parts.version, `version ${robot.version}`);
  say(parts.instruction, robot.instruction || robot.task);
  say(parts.rate, `${oneDigit(robot.rate_hz)} / s`);
  say(parts.age, robot.age_s > SILENT_S ? `silent ${duration(robot.age_s)}` : `${oneDigit(robot.age_s)} s old`);
  parts.age.classList.toggle("silent", robot.age_s > SILENT_S);
  say(parts.place, [robot.client, robot.purpose, robot.task].filter(Boolean).join(" · "));
  parts.frame.alt = `What ${robot.arm || "the arm"} sees`;
  if (robot.decisions > 0) {
    showFrame(parts.frame, `robots/${encodeURIComponent(robot.episode)}/frame?decision=${robot.decisions}`);
  }
  return card;
}

function retireCard(card) {
  card.node.classList.add("gone");
  say(card.parts.age, "episode over");
  if (Date.now() - card.seenMs < LINGER_MS) return;
  card.node.remove();
  cards.splice(cards.indexOf(card), 1);
}

function showFrame(image, url) {
  if (image.getAttribute("src") !== url) image.src = url;
}

// Sessions: a panel each.

const panels = new Map(); // session -> its panel
const MEANINGS = {
  promote: "The version on trial becomes live at once, whatever the gate would say.",
  roll_back: "The version on trial is dropped; without one, the version that was live before is so again.",
  pause: "Robots go on with the live version; what is on trial is dropped, and nothing new is tried.",
  resume: "Versions are tried again.",
  stop: "The session is over for good, and its robots get no more episodes.",
};
const title = (control) => (control[0].toUpperCase() + control.slice(1)).replace("_", " ");
const percent = (share) => `${Math.round(100 * share)} %`;

function showSessions(sessions) {
  byId("sessions").hidden = sessions.length === 0;
  for (const [name, panel] of panels) {
    if (sessions.some((one) => one.session === name)) continue;
    panel.node.remove();
    panels.delete(name);
  }
  for (const session of sessions) {
    if (!panels.has(session.session)) panels.set(session.session, newPanel(session.session));
    fillPanel(panels.get(session.session), session);
  }
}

function newPanel(name) {
  const panel = { node: element("article", "session"), parts: {}, buttons: {}, version: 0 };
  const part = (className, tag) => (panel.parts[className] = element(tag, className));
  const heading = element("h3");
  heading.append(element("span", "", name), part("state", "span"));
  const table = element("table");
  const head = element("tr");
  head.append(...["Version", "Success", "95 % interval", "With help", "Held, clipped", "Errors"].map((text) => element("th", "", text)));
  table.append(element("thead"), part("versions", "tbody"));
  table.tHead.append(head);
  const buttons = element("div", "buttons");
  for (const control of Object.keys(MEANINGS)) {
    const button = element("button", "", title(control));
    button.type = "button";
    button.onclick = () => ask(name, control, panel.version);
    panel.buttons[control] = button;
    buttons.append(button);
  }
  const episodes = element("button", "", "Its episodes");
  episodes.type = "button";
  episodes.onclick = () => showOnly(name);
  buttons.append(episodes);
  panel.node.append(heading, part("task", "p"), table, part("standing", "p"), buttons, part("log", "ol"));
  byId("sessions").append(panel.node);
  return panel;
}

function fillPanel(panel, session) {
  const { parts, buttons } = panel;
  const over = session.state === "stopped";
  panel.version = session.candidate ?? session.live; // that a promotion or a roll back would befall
  say(parts.state, session.state);
  parts.state.classList.toggle("running", session.state === "running");
  say(parts.task, [session.task, `${session.episodes} episodes, ${session.open} open`].filter(Boolean).join(" · "));
  say(parts.standing, session.standing);
  buttons.promote.disabled = session.candidate === null;
  buttons.roll_back.disabled = over || (session.candidate === null && session.past === 0);
  buttons.pause.hidden = session.state !== "running";
  buttons.resume.hidden = session.state !== "paused";
  buttons.stop.disabled = over;
  fillOnce(parts.versions, session.versions, versionRow);
  fillOnce(parts.log, session.log, eventLine);
}

// Rebuilds a list when what it shows has changed, and then alone.
function fillOnce(list, items, line) {
  const shown = JSON.stringify(items);
  if (list.shown === shown) return;
  list.shown = shown;
  list.replaceChildren(...items.map(line));
}

function versionRow({ version, role, successes, episodes, interval, interventions, trouble, errors }) {
  const row = element("tr");
  const [low, high] = interval;
  const bar = element("td");
  bar.append(intervalBar(successes / Math.max(1, episodes), low, high), element("span", "", `${percent(low)} to ${percent(high)}`));
  row.append(
    element("td", "", `${version}, ${role}`),
    element("td", "", `${successes} of ${episodes}`),
    bar,
    element("td", "", interventions),
    element("td", "", percent(trouble)),
    element("td", "", errors),
  );
  return row;
}

function intervalBar(rate, low, high) {
  const bar = byId("interval").content.firstElementChild.cloneNode(true);
  const [, interval, mark] = bar.children;
  interval.setAttribute("d", `M${100 * low} 5H${100 * high}`);
  mark.setAttribute("d", `M${100 * rate} 1V9`);
  return bar;
}

function eventLine({ unix_s, what, version, by, reason }) {
  const item = element("li");
  item.append(
    element("span", "quiet", clock(unix_s)),
    element("span", "", `${what}, version ${version}, by ${by}`),
    element("span", "note quiet", reason),
  );
  return item;
}

// A person's word about a session, which takes an admin's token where the server asks for tokens.

const word = { session: "", control: "", version: 0 };

function ask(session, control, version) {
  Object.assign(word, { session, control, version });
  const whose = control === "promote" || control === "roll_back" ? `, version ${version}` : "";
  say(byId("word-title"), `${title(control)}: session ${session}${whose}`);
  say(byId("word-meaning"), MEANINGS[control]);
  say(byId("word-say"), title(control));
  say(byId("word-refusal"), "");
  byId("word-note").value = "";
  byId("word").showModal();
}

async function sayWord() {
  const token = byId("word-token").value;
  const headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
  const body = JSON.stringify({ note: byId("word-note").value, version: word.version });
  const path = `sessions/${encodeURIComponent(word.session)}/${word.control}`;
  try {
    const reply = await fetch(path, { method: "POST", headers, body, signal: AbortSignal.timeout(GIVE_UP_MS) });
    if (reply.ok) byId("word").close();
    else say(byId("word-refusal"), (await reply.text()).trim());
    if (reply.status === 401 || reply.status === 403) byId("word-token-label").hidden = false;
  } catch (error) {
    say(byId("word-refusal"), `The server did not answer: ${error.message}`);
  }
}

byId("word-say").onclick = sayWord;
byId("word-cancel").onclick = () => byId("word").close();

// Plots.

function showPlots(samples) {
  const column = (index) => samples.map((sample) => [sample[0], sample[index]]);
  showPlot(byId("queue-plot"), column(1));
  showPlot(byId("batch-plot"), column(2));
  showPlot(byId("rate-plot"), column(3));
}

function showPlot(figure, points) {
  const values = points.map(([, value]) => value ?? 0);
  const top = 2 ** Math.ceil(Math.log2(Math.max(1, ...values)));
  const now = points.at(-1)?.[0] ?? 0;
  let line = "";
  let pen = "M";
  for (const [unixS, value] of points) {
    const [x, y] = [300 - (300 * (now - unixS)) / SPAN_S, 100 - (96 * value) / top];
    if (value !== null) line += `${pen}${oneDigit(x)} ${oneDigit(y)}h0`;
    pen = value === null ? "M" : "L";
  }
  figure.querySelector("path").setAttribute("d", line);
  say(figure.querySelector("output"), top);
}

// Swaps of the live version.

function showSwaps(swaps) {
  const list = byId("swap-list");
  byId("no-swaps").hidden = swaps.length > 0;
  if (list.dataset.newest === String(swaps[0]?.unix_s)) return;
  list.dataset.newest = String(swaps[0]?.unix_s);
  list.replaceChildren(
    ...swaps.map((swap) => {
      const item = element("li");
      item.append(
        element("span", "quiet", clock(swap.unix_s)),
        element("span", "", `${swap.previous} to ${swap.live}`),
        element("span", "note quiet", swap.note),
      );
      return item;
    }),
  );
}

// Stored episodes.  New ones are announced and not pushed in, so that nothing moves under the pointer.

let answering = ""; // the server whose episodes are in the list
let newest = 0; // of its episodes
let listed = 0; // the newest one when the list was made
let only = ""; // the session whose episodes are in the list; empty: all

function showEpisodes({ server, stores_episodes, newest_episode }) {
  if (server !== answering) listed = 0;
  [answering, newest] = [server, newest_episode];
  if (!stores_episodes) say(byId("no-episodes"), "This server keeps no episodes. With --episodes DIR it offers them here to play back.");
  else if (newest_episode === 0) say(byId("no-episodes"), "No episode has ended yet.");
  else if (listed === 0) loadEpisodes();
  showTable();
  byId("newer").hidden = listed === 0 || newest_episode === listed;
  say(byId("newer"), only ? "Look again" : `Show ${newest_episode - listed} newer`);
}

function showOnly(session) {
  only = session;
  byId("all").hidden = !only;
  say(byId("episodes-title"), only ? `Episodes of session ${only}` : "Episodes");
  byId("episodes").scrollIntoView();
  loadEpisodes();
}

async function loadEpisodes() {
  const asked = newest;
  const episodes = await get(only ? `episodes?session=${encodeURIComponent(only)}` : "episodes").catch(() => []);
  if (episodes.length === 0 && !only) return;
  listed = only ? asked : episodes[0].sequence;
  byId("newer").hidden = true;
  byId("episode-rows").replaceChildren(...episodes.map(episodeRow));
  showTable();
}

function showTable() {
  byId("no-episodes").hidden = listed > 0;
  byId("episode-table").hidden = listed === 0;
}

function episodeRow(episode) {
  const row = element("tr");
  if (episode.damaged) {
    const reason = element("td", "error", episode.damaged);
    reason.colSpan = 7;
    row.append(element("td", "", episode.sequence), reason);
    return row;
  }
  const button = element("button", "", episode.instruction || episode.task || episode.episode);
  button.type = "button";
  button.onclick = () => openPlayer(episode);
  const title = element("td");
  title.append(button);
  const outcome = element("td");
  outcome.append(outcomeMark(episode));
  row.append(
    element("td", "", episode.sequence),
    title,
    outcome,
    element("td", "wide", episode.version),
    element("td", "wide", episode.arm),
    element("td", "wide", episode.decisions),
    element("td", "wide", duration(episode.seconds)),
    element("td", "", clock(episode.started_unix_s)),
  );
  return row;
}

const outcomeMark = ({ outcome }) => element("span", `outcome ${outcome}`, outcome);

// The player: an episode's frames one after another.

const player = { episode: null, timer: null };

function openPlayer(episode) {
  player.episode = episode;
  say(byId("player-title"), episode.instruction || episode.task || episode.episode);
  byId("scrubber").max = Math.max(0, episode.frames - 1);
  byId("facts").replaceChildren(...facts(episode));
  byId("facts").querySelector("dd").prepend(outcomeMark(episode));
  byId("player").showModal();
  seek(0);
  play();
}

function facts(episode) {
  const rows = {
    Outcome: episode.message ? `, ${episode.message}` : "",
    Version: episode.version,
    Task: episode.task,
    Arm: episode.arm,
    Purpose: episode.purpose,
    Length: `${episode.decisions} decisions in ${duration(episode.seconds)}`,
    Episode: episode.episode,
  };
  return Object.entries(rows).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]);
}

const frameUrl = (index) => `episodes/${encodeURIComponent(player.episode.episode)}/frames/${index}`;

function seek(index) {
  const last = player.episode.frames - 1;
  byId("scrubber").value = index;
  say(byId("position"), last < 0 ? "no frames" : `${index + 1} / ${last + 1}`);
  if (last < 0) byId("player-frame").removeAttribute("src");
  else showFrame(byId("player-frame"), frameUrl(index));
  if (index < last) new Image().src = frameUrl(index + 1);
}

function play() {
  const last = player.episode.frames - 1;
  if (Number(byId("scrubber").value) >= last) seek(0);
  player.timer = setInterval(() => {
    const next = Number(byId("scrubber").value) + 1;
    if (next > last) pause();
    else seek(next);
  }, 1000 / FRAMES_PER_S);
  say(byId("play"), "Pause");
}

function pause() {
  clearInterval(player.timer);
  player.timer = null;
  say(byId("play"), "Play");
}

byId("newer").onclick = loadEpisodes;
byId("all").onclick = () => showOnly("");
byId("play").onclick = () => (player.timer === null ? play() : pause());
byId("scrubber").oninput = () => {
  pause();
  seek(Number(byId("scrubber").value));
};
byId("close").onclick = () => byId("player").close();
byId("player").onclose = pause;
tick();
