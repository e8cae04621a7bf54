//! Which instructions obey MXCSR and may raise #XM.

use iced_x86::Mnemonic;

/// Whether a vector instruction reads MXCSR or sets its flags (SDM 2A 2.4 to 2.7: exception classes 2 and 3 and
/// their EVEX kin). Loading MXCSR for one that does not is only slow; the opposite would be wrong, so
/// approximations and classifications are listed too.
#[rustfmt::skip]
pub(super) fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Addpd | Mnemonic::Addps | Mnemonic::Addsd | Mnemonic::Addss | Mnemonic::Addsubpd
            | Mnemonic::Addsubps | Mnemonic::Cmppd | Mnemonic::Cmpps | Mnemonic::Cmpsd | Mnemonic::Cmpss
            | Mnemonic::Comisd | Mnemonic::Comiss | Mnemonic::Cvtdq2pd | Mnemonic::Cvtdq2ps
            | Mnemonic::Cvtpd2dq | Mnemonic::Cvtpd2pi | Mnemonic::Cvtpd2ps | Mnemonic::Cvtpi2pd
            | Mnemonic::Cvtpi2ps | Mnemonic::Cvtps2dq | Mnemonic::Cvtps2pd | Mnemonic::Cvtps2pi
            | Mnemonic::Cvtsd2si | Mnemonic::Cvtsd2ss | Mnemonic::Cvtsi2sd | Mnemonic::Cvtsi2ss
            | Mnemonic::Cvtss2sd | Mnemonic::Cvtss2si | Mnemonic::Cvttpd2dq | Mnemonic::Cvttpd2pi
            | Mnemonic::Cvttps2dq | Mnemonic::Cvttps2pi | Mnemonic::Cvttsd2si | Mnemonic::Cvttss2si
            | Mnemonic::Divpd | Mnemonic::Divps | Mnemonic::Divsd | Mnemonic::Divss | Mnemonic::Dppd
            | Mnemonic::Dpps | Mnemonic::Haddpd | Mnemonic::Haddps | Mnemonic::Hsubpd | Mnemonic::Hsubps
            | Mnemonic::Maxpd | Mnemonic::Maxps | Mnemonic::Maxsd | Mnemonic::Maxss | Mnemonic::Minpd
            | Mnemonic::Minps | Mnemonic::Minsd | Mnemonic::Minss | Mnemonic::Mulpd | Mnemonic::Mulps
            | Mnemonic::Mulsd | Mnemonic::Mulss | Mnemonic::Rcpps | Mnemonic::Rcpss | Mnemonic::Roundpd
            | Mnemonic::Roundps | Mnemonic::Roundsd | Mnemonic::Roundss | Mnemonic::Rsqrtps
            | Mnemonic::Rsqrtss | Mnemonic::Sqrtpd | Mnemonic::Sqrtps | Mnemonic::Sqrtsd | Mnemonic::Sqrtss
            | Mnemonic::Subpd | Mnemonic::Subps | Mnemonic::Subsd | Mnemonic::Subss | Mnemonic::Ucomisd
            | Mnemonic::Ucomiss | Mnemonic::Vaddpd | Mnemonic::Vaddph | Mnemonic::Vaddps | Mnemonic::Vaddsd
            | Mnemonic::Vaddsh | Mnemonic::Vaddss | Mnemonic::Vaddsubpd | Mnemonic::Vaddsubps
            | Mnemonic::Vcmppd | Mnemonic::Vcmpph | Mnemonic::Vcmpps | Mnemonic::Vcmpsd | Mnemonic::Vcmpsh
            | Mnemonic::Vcmpss | Mnemonic::Vcomisd | Mnemonic::Vcomish | Mnemonic::Vcomiss
            | Mnemonic::Vcvtdq2pd | Mnemonic::Vcvtdq2ph | Mnemonic::Vcvtdq2ps | Mnemonic::Vcvtpd2dq
            | Mnemonic::Vcvtpd2ph | Mnemonic::Vcvtpd2ps | Mnemonic::Vcvtpd2qq | Mnemonic::Vcvtpd2udq
            | Mnemonic::Vcvtpd2uqq | Mnemonic::Vcvtph2dq | Mnemonic::Vcvtph2pd | Mnemonic::Vcvtph2ps
            | Mnemonic::Vcvtph2psx | Mnemonic::Vcvtph2qq | Mnemonic::Vcvtph2udq | Mnemonic::Vcvtph2uqq
            | Mnemonic::Vcvtph2uw | Mnemonic::Vcvtph2w | Mnemonic::Vcvtps2dq | Mnemonic::Vcvtps2pd
            | Mnemonic::Vcvtps2ph | Mnemonic::Vcvtps2phx | Mnemonic::Vcvtps2qq | Mnemonic::Vcvtps2udq
            | Mnemonic::Vcvtps2uqq | Mnemonic::Vcvtqq2pd | Mnemonic::Vcvtqq2ph | Mnemonic::Vcvtqq2ps
            | Mnemonic::Vcvtsd2sh | Mnemonic::Vcvtsd2si | Mnemonic::Vcvtsd2ss | Mnemonic::Vcvtsd2usi
            | Mnemonic::Vcvtsh2sd | Mnemonic::Vcvtsh2si | Mnemonic::Vcvtsh2ss | Mnemonic::Vcvtsh2usi
            | Mnemonic::Vcvtsi2sd | Mnemonic::Vcvtsi2sh | Mnemonic::Vcvtsi2ss | Mnemonic::Vcvtss2sd
            | Mnemonic::Vcvtss2sh | Mnemonic::Vcvtss2si | Mnemonic::Vcvtss2usi | Mnemonic::Vcvttpd2dq
            | Mnemonic::Vcvttpd2qq | Mnemonic::Vcvttpd2udq | Mnemonic::Vcvttpd2uqq | Mnemonic::Vcvttph2dq
            | Mnemonic::Vcvttph2qq | Mnemonic::Vcvttph2udq | Mnemonic::Vcvttph2uqq | Mnemonic::Vcvttph2uw
            | Mnemonic::Vcvttph2w | Mnemonic::Vcvttps2dq | Mnemonic::Vcvttps2qq | Mnemonic::Vcvttps2udq
            | Mnemonic::Vcvttps2uqq | Mnemonic::Vcvttsd2si | Mnemonic::Vcvttsd2usi | Mnemonic::Vcvttsh2si
            | Mnemonic::Vcvttsh2usi | Mnemonic::Vcvttss2si | Mnemonic::Vcvttss2usi | Mnemonic::Vcvtudq2pd
            | Mnemonic::Vcvtudq2ph | Mnemonic::Vcvtudq2ps | Mnemonic::Vcvtuqq2pd | Mnemonic::Vcvtuqq2ph
            | Mnemonic::Vcvtuqq2ps | Mnemonic::Vcvtusi2sd | Mnemonic::Vcvtusi2sh | Mnemonic::Vcvtusi2ss
            | Mnemonic::Vcvtuw2ph | Mnemonic::Vcvtw2ph | Mnemonic::Vdivpd | Mnemonic::Vdivph
            | Mnemonic::Vdivps | Mnemonic::Vdivsd | Mnemonic::Vdivsh | Mnemonic::Vdivss | Mnemonic::Vdppd
            | Mnemonic::Vdpps | Mnemonic::Vfcmaddcph | Mnemonic::Vfcmaddcsh | Mnemonic::Vfcmulcph
            | Mnemonic::Vfcmulcsh | Mnemonic::Vfixupimmpd | Mnemonic::Vfixupimmps | Mnemonic::Vfixupimmsd
            | Mnemonic::Vfixupimmss | Mnemonic::Vfmadd132pd | Mnemonic::Vfmadd132ph | Mnemonic::Vfmadd132ps
            | Mnemonic::Vfmadd132sd | Mnemonic::Vfmadd132sh | Mnemonic::Vfmadd132ss | Mnemonic::Vfmadd213pd
            | Mnemonic::Vfmadd213ph | Mnemonic::Vfmadd213ps | Mnemonic::Vfmadd213sd | Mnemonic::Vfmadd213sh
            | Mnemonic::Vfmadd213ss | Mnemonic::Vfmadd231pd | Mnemonic::Vfmadd231ph | Mnemonic::Vfmadd231ps
            | Mnemonic::Vfmadd231sd | Mnemonic::Vfmadd231sh | Mnemonic::Vfmadd231ss | Mnemonic::Vfmaddcph
            | Mnemonic::Vfmaddcsh | Mnemonic::Vfmaddsub132pd | Mnemonic::Vfmaddsub132ph
            | Mnemonic::Vfmaddsub132ps | Mnemonic::Vfmaddsub213pd | Mnemonic::Vfmaddsub213ph
            | Mnemonic::Vfmaddsub213ps | Mnemonic::Vfmaddsub231pd | Mnemonic::Vfmaddsub231ph
            | Mnemonic::Vfmaddsub231ps | Mnemonic::Vfmsub132pd | Mnemonic::Vfmsub132ph
            | Mnemonic::Vfmsub132ps | Mnemonic::Vfmsub132sd | Mnemonic::Vfmsub132sh | Mnemonic::Vfmsub132ss
            | Mnemonic::Vfmsub213pd | Mnemonic::Vfmsub213ph | Mnemonic::Vfmsub213ps | Mnemonic::Vfmsub213sd
            | Mnemonic::Vfmsub213sh | Mnemonic::Vfmsub213ss | Mnemonic::Vfmsub231pd | Mnemonic::Vfmsub231ph
            | Mnemonic::Vfmsub231ps | Mnemonic::Vfmsub231sd | Mnemonic::Vfmsub231sh | Mnemonic::Vfmsub231ss
            | Mnemonic::Vfmsubadd132pd | Mnemonic::Vfmsubadd132ph | Mnemonic::Vfmsubadd132ps
            | Mnemonic::Vfmsubadd213pd | Mnemonic::Vfmsubadd213ph | Mnemonic::Vfmsubadd213ps
            | Mnemonic::Vfmsubadd231pd | Mnemonic::Vfmsubadd231ph | Mnemonic::Vfmsubadd231ps
            | Mnemonic::Vfmulcph | Mnemonic::Vfmulcsh | Mnemonic::Vfnmadd132pd | Mnemonic::Vfnmadd132ph
            | Mnemonic::Vfnmadd132ps | Mnemonic::Vfnmadd132sd | Mnemonic::Vfnmadd132sh
            | Mnemonic::Vfnmadd132ss | Mnemonic::Vfnmadd213pd | Mnemonic::Vfnmadd213ph
            | Mnemonic::Vfnmadd213ps | Mnemonic::Vfnmadd213sd | Mnemonic::Vfnmadd213sh
            | Mnemonic::Vfnmadd213ss | Mnemonic::Vfnmadd231pd | Mnemonic::Vfnmadd231ph
            | Mnemonic::Vfnmadd231ps | Mnemonic::Vfnmadd231sd | Mnemonic::Vfnmadd231sh
            | Mnemonic::Vfnmadd231ss | Mnemonic::Vfnmsub132pd | Mnemonic::Vfnmsub132ph
            | Mnemonic::Vfnmsub132ps | Mnemonic::Vfnmsub132sd | Mnemonic::Vfnmsub132sh
            | Mnemonic::Vfnmsub132ss | Mnemonic::Vfnmsub213pd | Mnemonic::Vfnmsub213ph
            | Mnemonic::Vfnmsub213ps | Mnemonic::Vfnmsub213sd | Mnemonic::Vfnmsub213sh
            | Mnemonic::Vfnmsub213ss | Mnemonic::Vfnmsub231pd | Mnemonic::Vfnmsub231ph
            | Mnemonic::Vfnmsub231ps | Mnemonic::Vfnmsub231sd | Mnemonic::Vfnmsub231sh
            | Mnemonic::Vfnmsub231ss | Mnemonic::Vfpclasspd | Mnemonic::Vfpclassph | Mnemonic::Vfpclassps
            | Mnemonic::Vfpclasssd | Mnemonic::Vfpclasssh | Mnemonic::Vfpclassss | Mnemonic::Vgetexppd
            | Mnemonic::Vgetexpph | Mnemonic::Vgetexpps | Mnemonic::Vgetexpsd | Mnemonic::Vgetexpsh
            | Mnemonic::Vgetexpss | Mnemonic::Vgetmantpd | Mnemonic::Vgetmantph | Mnemonic::Vgetmantps
            | Mnemonic::Vgetmantsd | Mnemonic::Vgetmantsh | Mnemonic::Vgetmantss | Mnemonic::Vhaddpd
            | Mnemonic::Vhaddps | Mnemonic::Vhsubpd | Mnemonic::Vhsubps | Mnemonic::Vmaxpd
            | Mnemonic::Vmaxph | Mnemonic::Vmaxps | Mnemonic::Vmaxsd | Mnemonic::Vmaxsh | Mnemonic::Vmaxss
            | Mnemonic::Vminpd | Mnemonic::Vminph | Mnemonic::Vminps | Mnemonic::Vminsd | Mnemonic::Vminsh
            | Mnemonic::Vminss | Mnemonic::Vmulpd | Mnemonic::Vmulph | Mnemonic::Vmulps | Mnemonic::Vmulsd
            | Mnemonic::Vmulsh | Mnemonic::Vmulss | Mnemonic::Vrangepd | Mnemonic::Vrangeps
            | Mnemonic::Vrangesd | Mnemonic::Vrangess | Mnemonic::Vrcp14pd | Mnemonic::Vrcp14ps
            | Mnemonic::Vrcp14sd | Mnemonic::Vrcp14ss | Mnemonic::Vrcpph | Mnemonic::Vrcpps
            | Mnemonic::Vrcpsh | Mnemonic::Vrcpss | Mnemonic::Vreducepd | Mnemonic::Vreduceph
            | Mnemonic::Vreduceps | Mnemonic::Vreducesd | Mnemonic::Vreducesh | Mnemonic::Vreducess
            | Mnemonic::Vrndscalepd | Mnemonic::Vrndscaleph | Mnemonic::Vrndscaleps | Mnemonic::Vrndscalesd
            | Mnemonic::Vrndscalesh | Mnemonic::Vrndscaless | Mnemonic::Vroundpd | Mnemonic::Vroundps
            | Mnemonic::Vroundsd | Mnemonic::Vroundss | Mnemonic::Vrsqrt14pd | Mnemonic::Vrsqrt14ps
            | Mnemonic::Vrsqrt14sd | Mnemonic::Vrsqrt14ss | Mnemonic::Vrsqrtph | Mnemonic::Vrsqrtps
            | Mnemonic::Vrsqrtsh | Mnemonic::Vrsqrtss | Mnemonic::Vscalefpd | Mnemonic::Vscalefph
            | Mnemonic::Vscalefps | Mnemonic::Vscalefsd | Mnemonic::Vscalefsh | Mnemonic::Vscalefss
            | Mnemonic::Vsqrtpd | Mnemonic::Vsqrtph | Mnemonic::Vsqrtps | Mnemonic::Vsqrtsd
            | Mnemonic::Vsqrtsh | Mnemonic::Vsqrtss | Mnemonic::Vsubpd | Mnemonic::Vsubph
            | Mnemonic::Vsubps | Mnemonic::Vsubsd | Mnemonic::Vsubsh | Mnemonic::Vsubss
            | Mnemonic::Vucomisd | Mnemonic::Vucomish | Mnemonic::Vucomiss
    )
}
