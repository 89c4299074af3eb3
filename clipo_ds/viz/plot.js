// A plotly figure that gets plotly's script from the one widget that has it (plotly_script.js).
//
// plotly's own FigureWidget brings 5 MB with every figure. A page with six of them, loaded anew, needs longer to parse
// those than anywidget waits (2 s), and shows "model not found" instead. So the script is loaded once a page, and
// `initialize` does not wait for it; what Python says meanwhile is drawn when its whole state comes, moments later. A
// figure is drawn when its box has a size, and again whenever that becomes another one.
//
// What was drawn and has been at rest for a while goes to Python as a picture, for the time after the kernel (still.py).

const CHANGES = ["addTraces", "deleteTraces", "moveTraces", "restyle", "relayout", "update", "animate",
                 "removeLayoutProps", "removeTraceProps"].map(name => `change:_py2js_${name}`);

const REST_MS = 3000;  // a picture is a second drawing, half a second of the page's time for 20,000 points

async function load({widget_manager: manager}) {
  while (!manager.clipoPlotly) await new Promise(resolve => setTimeout(resolve, 50));  // models come in any order
  return manager.clipoPlotly;
}

export default () => {
  let figure, loaded, behind = false;  // whether Python has said something that the stored state does not hold yet
  return {
    initialize({model}) {
      CHANGES.forEach(change => model.on(change, () => { behind = true; }));
      model.on("change:_widget_data", () => { behind = false; });
      loaded = load(model).then(plotly => {
        figure = plotly.default();
        figure.initialize({model});
        return plotly;
      });
    },
    async render({model, el}) {
      const plotly = await loaded;
      let remove, rest, width = 0;
      const send = async () => {
        if (el.clientWidth === 0) return;
        const {width, height} = el._fullLayout;
        model.send({picture: await window.Plotly.toImage(el, {format: "webp", width, height})});
      };
      const draw = () => {
        model.off("change:_widget_data", draw);
        remove?.();
        el.replaceChildren();
        remove = figure.render({model, el});
        el.once("plotly_afterplot", () => { model.set("_drawn", true); model.save_changes(); });
        el.on("plotly_afterplot", () => { clearTimeout(rest); rest = setTimeout(send, REST_MS); });
        if (behind) model.on("change:_widget_data", draw);
      };
      // What is not on the page, or hidden, has no width: plotly would draw for another, and put the title over itself.
      const box = new ResizeObserver(() => {
        if (el.clientWidth === 0 || el.clientWidth === width) return;
        width = el.clientWidth;
        if (remove === undefined) draw();
        else new plotly.FigureView(model, el).autosizeFigure();
      });
      box.observe(el);
      return () => {
        box.disconnect();
        clearTimeout(rest);
        model.off("change:_widget_data", draw);
        remove?.();
      };
    },
  };
};
