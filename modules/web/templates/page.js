// The page's own script: it checks files before they are sent, shows and announces answers, and works
// their slider, words and buttons. Gradio calls this function once; `settings` comes from page.py.
(settings) => {
  const SIDES = ['before', 'after'];
  const side_of = (node) => SIDES.find((side) => document.getElementById(side)?.contains(node));
  const ending_of = (name) => (name.match(/\.[^.]+$/)?.[0] ?? '').toLowerCase();
  const megabytes = (bytes) => Math.ceil(bytes / 2 ** 20);

  function note(side, text, is_problem) {
    const place = document.getElementById(`${side}-note`);
    place.classList.toggle('plain', !is_problem);
    place.textContent = text;
  }

  // ---- files: what is wrong with one, said next to its field instead of after an upload ----

  function find_problem(file) {
    const is_heic = settings.heic_endings.includes(ending_of(file.name));
    if (is_heic && !(settings.reads_heic && file.type)) {
      return `${file.name} is a HEIC picture, which cannot be read here. Save it as JPEG and choose that. `
        + '(On an iPhone: Settings, Camera, Formats, Most Compatible.)';
    }
    if (!file.type.startsWith('image/') || file.type.startsWith('image/svg')) {
      return `${file.name} is not a picture that this page can read. Choose a JPEG or PNG file.`;
    }
    if (file.size > settings.max_megabytes * 2 ** 20) {
      return `${file.name} has ${megabytes(file.size)} MB, and a picture can have up to `
        + `${settings.max_megabytes} MB. Make it smaller: 1,000 pixels on a side are plenty.`;
    }
    return '';
  }

  function check_file(event, files) {
    const side = side_of(event.target);
    if (!side || !files?.length) { return; }
    const problem = find_problem(files[0]);
    note(side, problem, true);
    if (!problem) { return; }
    event.preventDefault();
    event.stopImmediatePropagation();
    if (event.target.type === 'file') { event.target.value = ''; }
  }

  window.addEventListener('change', (event) => {
    if (event.target.type === 'file') { check_file(event, event.target.files); }
  }, true);
  window.addEventListener('drop', (event) => check_file(event, event.dataTransfer?.files), true);

  // Browsers show fewer formats than the server reads.
  function watch_pictures(kind, text) {
    document.addEventListener(kind, (event) => {
      const side = event.target.tagName === 'IMG' && side_of(event.target);
      if (side) { note(side, text, false); }
    }, true);
  }
  watch_pictures('error', 'Your browser cannot show this file, but the server may be able to read it.');
  watch_pictures('load', '');

  // ---- answers ----

  function announce(answer) {
    const shown = answer.querySelector('[data-spoken]');
    document.getElementById('spoken').textContent = shown ? shown.dataset.spoken : '';
    if (!shown) { return; }
    const { top, bottom } = shown.getBoundingClientRect();
    const is_hidden = bottom > window.innerHeight && top > window.innerHeight / 2;
    if (top < 0 || is_hidden) {
      const calm = window.matchMedia('(prefers-reduced-motion: reduce)').matches;
      answer.scrollIntoView({ behavior: calm ? 'auto' : 'smooth', block: 'start' });
    }
  }

  function choose_word(radio) {
    const figures = radio.closest('details').querySelectorAll('.look');
    figures.forEach((figure, index) => figure.classList.toggle('chosen', index === Number(radio.value)));
  }

  async function copy(button) {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      button.textContent = 'Copied';
      document.getElementById('spoken').textContent = 'Copied';
    } catch {
      // Browsers allow it only on https and on this machine.
      window.getSelection().selectAllChildren(button.parentNode.querySelector('.caption'));
      button.textContent = 'Press Ctrl-C';
    }
  }

  function download(text) {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
    link.download = 'caption.json';
    link.click();
    URL.revokeObjectURL(link.href);
  }

  document.addEventListener('input', (event) => {
    const input = event.target;
    if (input.closest('.compare')) { input.parentNode.style.setProperty('--at', `${input.value}%`); }
    if (input.closest('.looks') && input.type === 'radio') { choose_word(input); }
  });
  document.addEventListener('click', (event) => {
    const button = event.target.closest('[data-copy], [data-result]');
    if (button?.dataset.copy) { copy(button); }
    if (button?.dataset.result) { download(button.dataset.result); }
  });

  // Gradio builds the page after this script has been called.
  const waiting = new MutationObserver(() => {
    const answer = document.getElementById('answer');
    if (!answer || !SIDES.every((side) => document.getElementById(side))) { return; }
    waiting.disconnect();
    for (const side of SIDES) {
      const block = document.getElementById(side);
      block.setAttribute('role', 'group');
      block.setAttribute('aria-label', `The ${side} picture`);
    }
    new MutationObserver(() => announce(answer)).observe(answer, { childList: true, subtree: true });
  });
  waiting.observe(document.documentElement, { childList: true, subtree: true });
}
