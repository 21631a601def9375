"""`latentgen serve`: HTTP for other programs, a page for people, and a queue that loses nothing.

    request -> drawing.py  what to draw, checked and resolved; the seed is chosen here
            -> jobs.py     on disk before the answer goes out
            -> worker.py   in another process (process.py): the model, batches, pictures as files
            <- live.py     progress and previews while it draws

    app.py        puts it together: security, errors, health, metrics
    native.py     /jobs            our own API
    openai.py     /v1              that of OpenAI
    webui.py      /sdapi/v1        that of the WebUI, with controlunit.py for its ControlNets
    page.py       /                for people (Gradio)

The three APIs and the page turn what they are sent into the same `Drawing`; none of them knows how
it is drawn. A drawing names its seed and its pictures' files before it is accepted, so doing it
twice after a crash gives the same files, not more of them.
"""
