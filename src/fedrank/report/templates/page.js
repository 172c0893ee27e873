"use strict";
(() => {
  const root = document.documentElement;
  const narrow = matchMedia("(max-width: 640px)");
  const night = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const said = document.getElementById("said");
  let charts = JSON.parse(document.getElementById("charts").textContent);
  const drawn = new Map(); // id -> what it was drawn from, and how to take it away

  // ---- colours and type, from the style sheet

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function look() {
    const ink = css("--ink"), quiet = css("--quiet"), line = css("--line");
    const font = css("--font");
    const text = { labelColor: quiet, titleColor: quiet, labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      background: "transparent",
      font,
      axis: { ...text, domainColor: line, tickColor: line, gridColor: line, gridOpacity: 0.6, labelPadding: 6, titlePadding: 10, ticks: false, domain: false, labelLimit: narrow.matches ? 104 : 240 },
      axisX: { domain: true, ticks: true, tickSize: 4, grid: false, labelFlush: false, tickCount: narrow.matches ? 5 : 10 },
      axisY: { tickCount: 5 },
      legend: { ...text, labelColor: ink, orient: "top", direction: "horizontal", columns: narrow.matches ? 2 : 5, labelLimit: narrow.matches ? 128 : 170, symbolSize: 90, symbolStrokeWidth: 2.5, rowPadding: 6, columnPadding: 18, offset: 14, gradientThickness: 10 },
      view: { stroke: null },
      line: { strokeWidth: 2.4, strokeJoin: "round", strokeCap: "round" },
      bar: { cornerRadius: 0 },
      // The plot has a role, a name and a description of its own, and its numbers are in a table.
      mark: { color: css("--c1"), aria: false },
      style: { bars: { color: css("--bars"), fill: css("--bars") }, zero: { color: quiet, stroke: quiet, strokeWidth: 1.5, strokeDash: [3, 3] } },
      range: {
        category: [1, 2, 3, 4, 5, 6, 7, 8].map((n) => css(`--c${n}`)),
        ramp: [1, 2, 3, 4, 5].map((n) => css(`--r${n}`)),
      },
    };
  }

  // ---- charts

  const axis = () => document.querySelector('input[name="axis"]:checked')?.value ?? "round";

  function specOf(chart) {
    const spec = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", padding: 2, ...chart.spec };
    const x = chart.axes[axis()] ?? chart.axes.round;
    return x ? { ...spec, encoding: { ...spec.encoding, x } } : spec;
  }

  async function draw(place) {
    const chart = charts[place.dataset.chart];
    const from = chart && JSON.stringify([specOf(chart), root.dataset.theme, night.matches, narrow.matches]);
    const before = drawn.get(place);
    if (!chart || before?.from === from) return;
    const own = { from, view: null };
    drawn.set(place, own);
    place.dataset.state = "drawing";
    try {
      // ast: expressions are interpreted, so that no script is made of text and the page needs no unsafe-eval.
      const options = { renderer: "svg", ast: true, actions: false, defaultStyle: false, config: look(), tooltip: { disableDefaultStyle: true } };
      const stand = document.createElement("div");
      stand.style.width = `${place.clientWidth}px`;
      if (before?.view) place.style.minHeight = `${place.clientHeight}px`;
      before?.view?.finalize();
      place.replaceChildren(stand);
      stand.style.width = "";
      const found = await vegaEmbed(stand, specOf(chart), options);
      if (drawn.get(place) !== own) return found.finalize();
      own.view = found;
      place.style.minHeight = "";
      place.dataset.state = "drawn";
    } catch (error) {
      place.dataset.state = "failed";
      place.textContent = "This chart could not be drawn; its numbers are in the table below.";
      console.error(place.dataset.chart, error);
    }
  }

  async function drawAll() {
    for (const [place, { view }] of drawn) {
      if (!place.isConnected) {
        view?.finalize();
        drawn.delete(place);
      }
    }
    for (const place of document.querySelectorAll(".plot")) await draw(place);
    root.dataset.drawn = String(Number(root.dataset.drawn ?? 0) + 1);
  }

  // ---- light and dark

  const dark = () => (root.dataset.theme ?? (night.matches ? "dark" : "light")) === "dark";

  function label() {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Change to ${dark() ? "light" : "dark"} colours`);
  }

  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    label();
    drawAll();
  });
  night.addEventListener("change", () => { label(); drawAll(); });
  narrow.addEventListener("change", drawAll);
  document.addEventListener("change", (event) => {
    if (event.target.name === "axis") drawAll();
  });

  // ---- a run that goes on: what is new takes the place of what was, and nothing else is touched

  function become(now, next) {
    if (now.nodeType !== next.nodeType || now.nodeName !== next.nodeName || now.id !== next.id) {
      now.replaceWith(next.cloneNode(true));
    } else if (now.nodeType === Node.ELEMENT_NODE) {
      attributes(now, next);
      if (!now.classList.contains("plot")) children(now, next);
    } else if (now.data !== next.data) {
      now.data = next.data;
    }
  }

  const own = new Set(["open", "style", "data-state", "checked"]); // of whoever reads the page, or of a chart

  function attributes(now, next) {
    for (const { name } of [...now.attributes]) if (!own.has(name) && !next.hasAttribute(name)) now.removeAttribute(name);
    for (const { name, value } of next.attributes) if (!own.has(name) && now.getAttribute(name) !== value) now.setAttribute(name, value);
  }

  function children(now, next) {
    const known = new Map([...now.children].filter((one) => one.id).map((one) => [one.id, one]));
    let at = now.firstChild;
    for (const one of next.childNodes) {
      const same = one.id ? known.get(one.id) : at;
      if (!same || (!one.id && same.id)) {
        now.insertBefore(one.cloneNode(true), at);
        continue;
      }
      if (same !== at) now.insertBefore(same, at);
      at = same.nextSibling;
      become(same, one);
    }
    while (at) {
      const gone = at;
      at = at.nextSibling;
      gone.remove();
    }
  }

  function show(found) {
    charts = found.charts;
    document.title = `${found.title} – fedrank`;
    const next = document.createElement("div");
    next.append(...new DOMParser().parseFromString(found.body, "text/html").body.childNodes);
    const chosen = axis();
    children(document.getElementById("body"), next);
    const radios = [...document.querySelectorAll('input[name="axis"]')];
    (radios.find((one) => one.value === chosen) ?? radios[0] ?? {}).checked = true;
    if (said.textContent !== found.said) said.textContent = found.said;
    drawAll();
  }

  function follow(where) {
    const light = document.getElementById("live");
    let tag = "";
    light.hidden = false;
    const state = (word) => {
      if (light.textContent !== word) light.textContent = word;
      light.className = `live ${word === "live" ? "on" : "off"}`;
    };
    state("live");
    const ask = async () => {
      try {
        if (!document.hidden) {
          const answer = await fetch(where, { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
          if (answer.status === 200) {
            tag = answer.headers.get("ETag") ?? "";
            show(await answer.json());
          }
          state(answer.status === 200 || answer.status === 304 ? "live" : "the page cannot be made; trying again");
        }
      } catch {
        state("not connected; trying again");
      }
      setTimeout(ask, 2000);
    };
    ask();
  }

  label();
  drawAll();
  if (document.body.dataset.live) follow(document.body.dataset.live);
})();
