// Widgets find their code beside this page, never on another host. Loaded before require.js.
(() => {
  const root = document.documentElement.dataset.content_root || "./";
  const base = new URL(root + "_static/nbextensions", document.baseURI).href;
  const names = ["jupyter-leaflet", "anywidget", "jupyter-vue", "jupyter-vuetify"];
  window.require = { baseUrl: base, waitSeconds: 0, paths: Object.fromEntries(names.map((name) => [name, `${base}/${name}/index`])) };
  // Widgets ask MathJax 2 to typeset their labels; the site has MathJax 3, which sets the page itself.
  window.addEventListener("load", () => {
    if (window.MathJax && !window.MathJax.Hub) window.MathJax.Hub = { Queue() {} };
  });
})();
