from tests.journeys.test_usage import *
def test_dbg(vera, page):
    page.add_init_script("document.addEventListener('securitypolicyviolation', e => window.v = (window.v||[]).concat([[e.sourceFile, e.lineNumber, e.columnNumber, e.sample, e.target.outerHTML && e.target.outerHTML.slice(0,300)].join(' | ')]))")
    sign_in(page, "vera")
    page.goto("/tokens/usage/log/?period=all")
    print("A", page.evaluate("window.v"))
    page.get_by_role("link", name="Older").click()
    page.wait_for_url("**before=*")
    print("B", page.evaluate("window.v"))
    page.get_by_label("Operation").select_option("repurpose")
    page.wait_for_url("**type=repurpose**")
    page.wait_for_timeout(500)
    print("C", page.evaluate("window.v"))
    page.goto("/tokens/usage/?period=7d&by=hour&split=model")
    page.wait_for_timeout(1500)
    print("D", page.evaluate("window.v"))
    page.evaluate("window.n=0; const r=window.ResizeObserver; window.f=0; (function t(){window.f++; requestAnimationFrame(t)})()")
    import time
    page.get_by_text("Numbers as a table").first.click()
    for w,h in ((390,844),(1440,900)):
        page.set_viewport_size({"width":w,"height":h})
        for theme in ("light","dark"):
            page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            page.wait_for_timeout(1000)
            print(w, theme, "frames", page.evaluate("window.f"), "height", page.evaluate("document.documentElement.scrollHeight"), page.evaluate("[...document.querySelectorAll('canvas')].map(c=>c.width+'x'+c.height).join(' ')"))
            t=time.time()
            try: page.screenshot(path="/tmp/pm-h2/x.png", full_page=True, animations="disabled", timeout=60000); print("shot", time.time()-t)
            except Exception as e: print("timeout", time.time()-t)
    print("E", page.evaluate("window.v"))
