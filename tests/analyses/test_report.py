from tests.fake_draws import X
def test(): assert X==1
