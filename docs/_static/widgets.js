// Widgets find their code beside this page, never on another host. Loaded before require.js.
(() => {
  const root = document.documentElement.dataset.content_root || "./";
  const base = new URL(root + "_static/nbextensions", document.baseURI).href;
  const names = ["jupyter-leaflet", "anywidget", "jupyter-vue", "jupyter-vuetify"];
  window.require = { paths: Object.fromEntries(names.map((name) => [name, `${base}/${name}/index`])) };
})();
