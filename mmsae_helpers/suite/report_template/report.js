(function () {
  var root = document.documentElement;
  function stored() { try { return localStorage.getItem("mmsae-theme"); } catch (e) { return null; } }
  function dark() {
    var set = root.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  if (stored()) root.dataset.theme = stored();

  var figures = Array.prototype.slice.call(document.querySelectorAll(".plotly-figure"));
  function look() {
    var ink = getComputedStyle(root).getPropertyValue("--ink").trim();
    var grid = getComputedStyle(root).getPropertyValue("--line").trim();
    return { ink: ink, grid: grid };
  }
  function themed(figure) {
    var colours = look(), change = {
      "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font.color": colours.ink
    };
    Object.keys(figure.layout).forEach(function (key) {
      if (/^[xy]axis/.test(key)) change[key + ".gridcolor"] = change[key + ".zerolinecolor"] = colours.grid;
    });
    return Plotly.relayout(figure, change);
  }
  figures.forEach(function (figure) {
    var spec = JSON.parse(figure.querySelector("script").textContent);
    figure.textContent = "";
    spec.layout.autosize = true;
    delete spec.layout.width;
    Plotly.newPlot(figure, spec.data, spec.layout, { responsive: true, displaylogo: false }).then(themed);
  });

  document.getElementById("theme").addEventListener("click", function () {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("mmsae-theme", root.dataset.theme); } catch (e) { /* a page from disk may not store */ }
    figures.forEach(themed);
  });
  var code = document.getElementById("code");
  if (code) code.addEventListener("click", function () {
    var blocks = document.querySelectorAll("details.code"), open = !blocks[0] || !blocks[0].open;
    blocks.forEach(function (block) { block.open = open; });
    code.textContent = open ? "hide code" : "show code";
  });
})();
